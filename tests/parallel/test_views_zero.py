"""Rule views of ZeRO's fragments and partitions: as `test_views.py` asks, and that published writes reach forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.parallel.view_cases import check_gradients, check_values_and_state, mask_gradients
from tests.parallel.zero_cases import MAX_NORM, WORLD, backward, make_engine, train_step


def _live(engine: Any, parameter: Any) -> Tensor:
    """The parameter as forward sees it."""
    from deepspeed import zero

    if not hasattr(parameter, "ds_numel"):
        return parameter.detach().clone()
    with zero.GatheredParameters(parameter):
        return parameter.detach().clone()


def _check(stage: int, offload: str | None) -> bool:
    engine = make_engine(stage, offload=offload)
    model = engine.module.model
    assert all(engine.views.of(p).states() == {} for p in model.parameters())
    backward(engine, 0)
    check_gradients(engine)
    left = mask_gradients(engine)
    norm = engine.clip(MAX_NORM)
    torch.testing.assert_close(norm, torch.stack([v.norm() for v in left.values()]).norm(), rtol=1e-5, atol=1e-7)
    before = {name: engine.full_parameter(name) for name in left}
    engine.step(torch.tensor(False))
    check_values_and_state(engine)
    for name, gradient in left.items():
        if "norm" in name or "bias" in name:  # no weight decay moves these
            moved = engine.full_parameter(name) != before[name]
            assert torch.equal(moved, gradient.cpu() != 0), name
    _check_writes(engine)
    train_step(engine, 1)
    engine.close()
    return True


def _check_writes(engine: Any) -> None:
    up = engine.module.model.blocks[0].up
    view = engine.views.of(up.weight)
    mask = up.stages["mask"].mask
    beside = view.beside(mask)
    assert beside.piece == view.piece
    view.value.copy_(view.index().float())
    beside.value.copy_(view.index() % 2 == 0)
    for value in view.states().values():
        value.fill_(0.25)
    engine.views.publish([view, beside])
    numbers = torch.arange(view.numel).view(view.piece.shape)
    assert torch.equal(engine.full_parameter("blocks.0.up.weight"), numbers.float())
    assert torch.equal(_live(engine, up.weight), numbers.float())
    assert torch.equal(_live(engine, mask), numbers % 2 == 0)
    state = engine.optimizer_state()["blocks.0.up.weight/exp_avg"]
    assert (getattr(state, "to_local", lambda: state)() == 0.25).all()


@pytest.mark.parametrize(("stage", "offload"), [(0, None), (1, None), (2, None), (3, None), (2, "cpu"), (3, "cpu")])
def test_pieces_make_the_whole_and_writes_count(stage: int, offload: str | None) -> None:
    assert all(run_ranks(lambda: _check(stage, offload), WORLD))


def _persistent() -> bool:
    """Small parameters stay gathered under stage 3: a published write reaches what is gathered."""
    from leanmill.parallel import config as configs
    from leanmill.parallel.deepspeed import DeepSpeedEngine
    from leanmill.parallel.engine import Preparation
    from tests.parallel.zero_cases import MICRO, Train, adamw, materialise

    engine = DeepSpeedEngine(configs.DeepSpeedEngine(stage=3), device=torch.device("cpu"), persist_below=10**6)
    engine.prepare(
        Train(), Preparation(materialise=materialise, make_optimizer=adamw, num_micro_batches=MICRO, max_grad_norm=None)
    )
    train_step(engine, 0)
    up = engine.module.model.blocks[0].up
    mask = up.stages["mask"].mask
    assert up.weight.numel() == mask.numel() == 35 * 24, "not gathered, so this test tests nothing"
    view = engine.views.of(up.weight)
    beside = view.beside(mask)
    view.value.copy_(view.index().float())
    beside.value.copy_(view.index() % 2 == 0)
    engine.views.publish([view, beside])
    numbers = torch.arange(35 * 24).view(35, 24)
    return torch.equal(up.weight, numbers.float()) and torch.equal(mask, numbers % 2 == 0)


def test_what_stays_gathered_is_published_too() -> None:
    assert all(run_ranks(_persistent, WORLD))
