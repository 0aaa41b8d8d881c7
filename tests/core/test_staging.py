"""Staging a weight once, whole or in parts, and backward through it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanmill.core.facets import Statistic
from leanmill.core.site import LinearSite
from leanmill.core.stage import Slot, Stage
from leanmill.core.staging import StagedOnce, Tape, run_together, staged_once
from leanmill.peft_ext.lora.stage import LoraStage
from leanmill.quant.binary.stage import BinaryStage
from leanmill.quant.int_quant.stage import IntWeights
from leanmill.quant.lsq.stage import LsqStage
from leanmill.quant.paretoq.stage import make_stage
from leanmill.quant.quest.stage import HadamardWeight, QuestWeight
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import LearnedScale
from leanmill.quant.ternary.stage import TernaryStage
from leanmill.sparse.bdwp.stage import BdwpStage
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from leanmill.sparse.static_mask.stage import StaticMask


NUM_OUT, NUM_IN = 11, 32
CHAINS: dict[str, Callable[[Tensor], list[Stage]]] = {
    "nm": lambda w: [NMSparsityStage(2, 4)],
    "nm, decay": lambda w: [NMSparsityStage(2, 4, 0.3)],
    "ternary": lambda w: [TernaryStage()],
    "ternary rows": lambda w: [TernaryStage("absmean", "row")],
    "twn": lambda w: [TernaryStage("twn")],
    "mse rows": lambda w: [TernaryStage("mse", "row")],
    "fixed mask": lambda w: [_masked(w)],
    "fixed mask+lsq": lambda w: [_masked(w), LsqStage(w, 3, granularity="row")],
    "nm+ternary": lambda w: [NMSparsityStage(2, 4, 0.3), TernaryStage()],
    "lsq": lambda w: [LsqStage(w, 3)],
    "lsq rows": lambda w: [LsqStage(w, 3, granularity="row")],
    "lsq groups": lambda w: [LsqStage(w, 3, granularity="group", group_size=8)],
    "nm+lsq": lambda w: [NMSparsityStage(2, 4, 0.3), LsqStage(w, 3)],
    "int": lambda w: [IntWeights(4, granularity="tensor")],
    "int rows, mse": lambda w: [IntWeights(4, "mse", "row")],
    "binary": lambda w: [BinaryStage(Sharing("tensor"), center=True)],
    "nm+binary groups": lambda w: [NMSparsityStage(2, 4, 0.3), BinaryStage(Sharing("group", 8), center=False)],
    "ternary, warmed up": lambda w: [_half_way(TernaryStage(has_warmup=True))],
    "lsq, warmed up": lambda w: [_half_way(LsqStage(w, 3, has_warmup=True))],
    "paretoq": lambda w: [make_stage(w, 1.58)],
    "nm+paretoq of 1 bit": lambda w: [NMSparsityStage(2, 4, 0.3), make_stage(w, 1)],
    "quest": lambda w: [HadamardWeight(16), QuestWeight(4)],
    "nm+quest": lambda w: [HadamardWeight(16), NMSparsityStage(2, 4, 0.3), QuestWeight(4)],
}


def _masked(weight: Tensor) -> StaticMask:
    stage = StaticMask(weight)
    stage.initialise(torch.arange(weight.numel()).reshape(weight.shape) % 3)
    return stage


def _half_way(stage: Any) -> Any:
    stage.strength.fill_(0.25)
    return stage


def site_with(stages: Callable[[Tensor], Sequence[Stage]], seed: int = 0) -> LinearSite:
    torch.manual_seed(seed)
    site = LinearSite.adopt(nn.Linear(NUM_IN, NUM_OUT, bias=False), "layer")
    for stage in stages(site.weight):
        site.put(stage)
        if isinstance(stage, LearnedScale):
            stage.initialise(site.weight)
    return site


def gradients_at_use(site: LinearSite, uses: Sequence[Tensor]) -> dict[str, Tensor]:
    for gradient in uses:
        site.effective_weight().backward(gradient)
    return {name: p.grad.clone() for name, p in site.named_parameters() if p.grad is not None}


def whole_tape(site: LinearSite) -> Tape:
    weight = StagedOnce([site])
    return Tape(weight, weight.raw, weight.own, is_part=False, has_backward=True)


def never(asked: list[Statistic]) -> list[Tensor]:
    raise AssertionError("a whole weight has nobody to ask")


@pytest.mark.parametrize("chain", CHAINS)
def test_once_equals_at_use(chain):
    uses = torch.randn(3, NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(1))
    site = site_with(CHAINS[chain])
    expected = site.effective_weight().detach()
    tape = whole_tape(site)
    (staged,) = run_together([tape.staging()], never)
    assert torch.equal(staged, expected)
    assert not staged.requires_grad
    found = tape.pull_back(uses.sum(0))
    found = [gradient for gradient in found if gradient is not None]  # a fixed mask has none
    for (name, gradient), got in zip(gradients_at_use(site_with(CHAINS[chain]), uses).items(), found, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sizes", [(6, 5), (4, 4, 3, 0)])
@pytest.mark.parametrize("chain", CHAINS)
def test_parts_make_the_whole(chain, sizes):
    site = site_with(CHAINS[chain])
    gradient = torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(2))
    whole = whole_tape(site)
    (expected,) = run_together([whole.staging()], never)
    weight = StagedOnce([site])
    # Before anything runs backward, which spends a decay.
    tapes, decay = [], _decay(site)
    own = [p.split(sizes) if weight.goes_by_row(p) else [p] * len(sizes) for p in weight.own]
    for index, part in enumerate(weight.raw.split(sizes)):
        tapes.append(Tape(weight, part, [o[index] for o in own], is_part=True, has_backward=True))
    staged = run_together([tape.staging() for tape in tapes], _answer)
    torch.testing.assert_close(torch.cat(staged), expected, rtol=0, atol=0)
    found = []
    for tape, cut in zip(tapes, gradient.split(sizes), strict=True):
        _fill(site, decay)  # every rank has its own
        found.append(tape.pull_back(cut))
    _fill(site, decay)
    for index, value in enumerate(whole.pull_back(gradient)):
        parts = [part[index] for part in found]
        by_row = index == 0 or weight.goes_by_row(weight.own[index - 1])
        if value is None:  # of a fixed mask
            assert parts == [None] * len(parts)
            continue
        joined = torch.cat(parts) if by_row else torch.stack(parts).sum(0)
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-6)


def _answer(asked: list[Statistic]) -> list[Tensor]:
    """The parts are of one weight and ask alike."""
    values = torch.stack([statistic.value for statistic in asked])
    combined = values.sum(0) if asked[0].over_parts == "sum" else values.amax(0)
    return [combined] * len(asked)


def _decay(site: LinearSite) -> float:
    stage: Any = site.stage(Slot.MASK)
    return float(stage.decay_left) if isinstance(stage, NMSparsityStage) else 0.0


def _fill(site: LinearSite, decay: float) -> None:
    stage: Any = site.stage(Slot.MASK)
    if isinstance(stage, NMSparsityStage):
        stage.decay_left.fill_(decay)


def test_one_collective_serves_all_weights():
    calls = []

    def answer(asked: list[Statistic]) -> list[Tensor]:
        calls.append(len(asked))
        return [statistic.value for statistic in asked]

    sites = [site_with(CHAINS[name]) for name in ("ternary", "nm", "ternary", "twn")]
    weights = [StagedOnce([site]) for site in sites]
    tapes = [Tape(w, w.raw, w.own, is_part=True, has_backward=True) for w in weights]
    staged = run_together([tape.staging() for tape in tapes], answer)
    assert calls == [3, 1, 1]
    for site, got in zip(sites, staged, strict=True):
        torch.testing.assert_close(got, site.effective_weight(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stages", "in_parts", "reason"),
    [
        (lambda w: [NMSparsityStage(2, 4)], True, None),
        (lambda w: [LoraStage(w, 2, 1.0), NMSparsityStage(2, 4)], False, "lora stages at every use"),
        (lambda w: [BdwpStage(2, 4)], False, "bdwp stages at every use"),
        (lambda w: [TernaryStage("mse")], False, None),
        (lambda w: [TernaryStage("mse")], True, "ternary needs all of its rows"),
        (lambda w: [IntWeights(4, "mse", "tensor")], True, "int_quant needs all of its rows"),
    ],
)
def test_which_weights(stages, in_parts, reason):
    site = site_with(stages)
    found, reasons = staged_once(nn.Sequential(site), in_parts=in_parts)
    assert [weight.sites for weight in found] == ([] if reason else [(site,)])
    assert reasons == ({"layer": reason} if reason else {})


def test_a_frozen_weight_whose_stages_train_is_staged_at_use():
    site = site_with(lambda w: [LsqStage(w, 3)])
    site.weight.requires_grad_(False)
    assert staged_once(nn.Sequential(site), in_parts=False)[1] == {"layer": "it is frozen while its stages train"}
    site.stages.requires_grad_(False)
    assert not staged_once(nn.Sequential(site), in_parts=False)[1]


@pytest.mark.parametrize("shared", [True, False])
def test_sites_that_share_a_weight(shared):
    one, other = site_with(lambda w: [LsqStage(w, 3)]), site_with(lambda w: [LsqStage(w, 3)])
    other.weight = one.weight
    if shared:
        other.stages = one.stages
    found, reasons = staged_once(nn.Sequential(one, other), in_parts=False)
    assert [weight.sites for weight in found] == ([(one, other)] if shared else [])
    assert bool(reasons) != shared


PACKED = {
    "nm": (lambda: NMSparsityStage(2, 4), 0.57),
    "1:8": (lambda: NMSparsityStage(1, 8), 0.2),
    "ternary": (lambda: TernaryStage(), 0.135),
    "ternary rows": (lambda: TernaryStage("absmean", "row"), 0.135),
}


@pytest.mark.parametrize("shape", [(12, 320), (4, 6, 320), (5, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", PACKED)
def test_packing_loses_nothing(kind, dtype, shape):
    make, share = PACKED[kind]
    stage = make()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight[0] = 0
    staged = stage(weight).to(dtype)
    packing = stage.packing(torch.Size(shape))
    assert packing is not None
    padding = staged.new_zeros(1, *shape[1:])
    parts = [*staged.split(3), padding]
    packed = [packing.pack(part) for part in parts]
    back = packing.unpack([torch.cat(tensors) for tensors in zip(*packed, strict=True)])
    assert torch.equal(back, torch.cat([staged, padding]))
    if shape[-1] == 320 and dtype == torch.bfloat16:
        num_bytes = sum(t.nbytes for tensors in packed[:-1] for t in tensors)
        assert num_bytes <= share * staged.nbytes
