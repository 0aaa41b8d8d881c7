"""Integers of quantised weights stand for exactly what training multiplies with."""

import pytest
import torch

from leanmill.quant.binary.stage import BinaryStage
from leanmill.quant.int_quant.stage import IntWeights
from leanmill.quant.lsq.stage import LsqStage
from leanmill.quant.paretoq.stage import make_stage
from leanmill.quant.sharing import Sharing
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage


def started(stage, weight):
    stage.initialise(weight)
    return stage


STAGES = {
    "binary": (lambda w: BinaryStage(Sharing("tensor"), center=True), 1),
    "binary rows": (lambda w: BinaryStage(Sharing("row"), center=False), 1),
    "binary groups": (lambda w: BinaryStage(Sharing("group", 8), center=True), 1),
    "int_quant 2": (lambda w: IntWeights(2), "ternary"),
    "lsq symmetric 2": (lambda w: started(LsqStage(w, 2, "symmetric", "row"), w), "ternary"),
    "lsq midrise": (lambda w: started(LsqStage(w, 3, "midrise", "row"), w), 4),
    "paretoq 1": (lambda w: started(make_stage(w, 1), w), 1),
    "paretoq 1.58": (lambda w: started(make_stage(w, 1.58), w), "ternary"),
    "paretoq 2": (lambda w: started(make_stage(w, 2), w), 2),
    "paretoq 3": (lambda w: started(make_stage(w, 3), w), 4),
}


def values_of(codes):
    groups = (codes.values.double() - codes.zero).unflatten(-1, (codes.scales.shape[-1], -1))
    return (groups * codes.scales.double().unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("shape", [(13, 24), (3, 4, 8)])
@pytest.mark.parametrize("name", STAGES)
def test_codes_are_the_staged_weight(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    make, encoding = STAGES[name]
    stage = make(weight)
    codes = stage.codes(weight)
    assert codes.encoding == encoding
    assert codes.values.shape == shape
    torch.testing.assert_close(values_of(codes), stage(weight).detach().double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["binary", "binary rows", "binary groups"])
def test_signs_of_a_masked_weight_are_ternary(name):
    weight = NMSparsityStage(2, 4)(torch.randn(5, 16))
    stage = STAGES[name][0](weight)
    codes = stage.codes(weight)
    assert codes.encoding == "ternary"
    torch.testing.assert_close(values_of(codes), stage(weight).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["lsq midrise", "paretoq 1", "paretoq 2"])
def test_a_grid_without_zero_has_no_codes_for_one(name):
    weight = NMSparsityStage(2, 4)(torch.randn(5, 16))
    stage = STAGES[name][0](weight)
    assert (stage(weight) == 0).sum() == 40
    assert stage.codes(weight) is None


@pytest.mark.parametrize("alpha", [1.0, -1.0])
def test_the_sign_of_a_tiny_weight_is_not_lost(alpha):
    weight = torch.tensor([[-1e-12, 1e-12, 1.0, -1.0]])
    stage = make_stage(weight, 1)
    with torch.no_grad():
        stage.scale.fill_(alpha)
    codes = stage.codes(weight)
    assert codes.values.tolist() == [[0, 1, 1, 0]]
    assert torch.equal(values_of(codes), stage(weight).detach().double())
