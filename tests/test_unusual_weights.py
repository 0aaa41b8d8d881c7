"""Masks and quantisers on weights that are all zero, constant, tiny or no numbers: none crashes, none hides them."""

import pytest
import torch
from torch import nn

from leanmill.core.noise import Noise
from leanmill.core.stage import Stage
from leanmill.models.materialise import initialise_stages
from tests.core.tiny import install


TECHNIQUES = [
    {"type": "nm_sparsity"},
    {"type": "nm_sparsity", "transposable": True},
    {"type": "nm_sparsity", "progressive": {"decay": "exponential"}},
    {"type": "bdwp"},
    {"type": "mask_llm"},
    {"type": "mask_llm", "num_kept": 4, "group_size": 8, "sampler": "draws"},
    {"type": "learned_threshold"},
    {"type": "static_mask"},
    {"type": "rigl", "start": "magnitude"},
    {"type": "gradual_pruning"},
    {"type": "early_ticket"},
    {"type": "ternary", "input_norm": True, "activation_bits": 8},
    {"type": "ternary", "scale": "twn", "granularity": "row"},
    {"type": "ternary", "scale": "mse"},
    {"type": "binary"},
    {"type": "binary", "granularity": "row", "center": False},
    {"type": "binary", "num_bases": 2},
    {"type": "binary", "salient": 0.1},
    {"type": "binary", "frequency": 20.0, "center": False},
    {"type": "dual_binary"},
    {"type": "int_quant", "activation_bits": 8},
    {"type": "int_quant", "scale": "mse", "granularity": "group", "group_size": 8},
    {"type": "int_quant", "weight_bits": 2, "switch_bits": [8, 2]},
    {"type": "lsq"},
    {"type": "lsq", "weight_bits": 1, "grid": "midrise", "weight_start": "lsq_plus", "granularity": "row"},
    {"type": "paretoq", "weight_bits": 1},
    {"type": "paretoq", "weight_bits": 1.58},
    {"type": "paretoq", "weight_bits": 2},
    {"type": "paretoq", "weight_bits": 4},
    {"type": "quest"},
    {"type": "quest", "weight_bits": 1, "activation_bits": 1},
    {"type": "fp_quant"},
    {"type": "fp_quant", "weight_format": "nvfp4", "activation_format": "nvfp4"},
    {"type": "fp_quant", "weight_format": "fp4"},
]
FINITE = {
    "zero": lambda weight: weight.zero_(),
    "constant": lambda weight: weight.fill_(0.5),
    "zero row": lambda weight: weight[0].zero_(),
    "constant row": lambda weight: weight[1].fill_(-0.3),
    "tiny": lambda weight: weight.mul_(1e-30),
}


def step(technique, change, dtype=torch.float32):
    """The output of one layer in training and in evaluation, and every gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        change(model[0].weight)
    model.to(dtype)
    install(model, technique)
    for module in model.modules():
        if isinstance(module, Noise):
            module.renew(0, 1)
        elif isinstance(module, Stage):
            module.reset_parameters()
    assert model[0].weight_stages()
    initialise_stages(model)
    tokens = torch.randn(4, 32).to(dtype).requires_grad_()
    out = model.train()(tokens)
    out.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return {"out": out, "evaluated": model.eval()(tokens), "tokens": tokens.grad, **gradients}


def name_of(technique):
    return "-".join(str(value) for value in technique.values())


@pytest.mark.parametrize("technique", TECHNIQUES, ids=name_of)
def test_weights_without_spread_give_finite_values_and_gradients(technique):
    for name, change in FINITE.items():
        for dtype in (torch.float32, torch.bfloat16):
            for what, value in step(technique, change, dtype).items():
                assert value.isfinite().all(), f"{name}, {dtype}: {what}"


@pytest.mark.parametrize("technique", TECHNIQUES, ids=name_of)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_not_hidden(technique, bad):
    """Its step then counts as not finite: it is skipped, or the run ends and says so."""
    found = step(technique, lambda weight: weight[3, 5].fill_(bad))
    assert not found["out"].isfinite().all()
    assert not found["evaluated"].isfinite().all()
