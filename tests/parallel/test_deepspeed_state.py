"""State under ZeRO: resuming, moving between stages and rank counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leanmill.core.errors import RunError
from leanmill.parallel.deepspeed_state import ZeroState
from leanmill.parallel.tensors import assign
from tests.distributed import run_ranks
from tests.parallel.zero_cases import (
    HIDDEN,
    INNER,
    WORLD,
    Values,
    assert_close,
    assert_equal,
    make_engine,
    snapshot,
    train_step,
    trained_weights,
)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bitwise(stage: int) -> None:
    """State read after step 2 into a new engine gives steps 3 and 4 bitwise, from either kind of reader."""

    def ranks() -> None:
        whole = make_engine(stage)
        for step in range(2):
            train_step(whole, step)
        model, optimizer = whole.model_state(), whole.optimizer_state()
        saved = {k: v.clone() for k, v in model.items()}, {k: v.clone() for k, v in optimizer.items()}
        for step in (2, 3):
            train_step(whole, step)

        resumed = make_engine(stage)
        # As distributed checkpointing does it: read in place into what the engine hands out.
        for mine, kept in zip((resumed.model_state(), resumed.optimizer_state()), saved, strict=True):
            assert mine.keys() == kept.keys()
            for name, tensor in mine.items():
                assign(tensor, kept[name])
            (resumed.load_model_state if mine.keys() == saved[0].keys() else resumed.load_optimizer_state)(mine)
        for step in (2, 3):
            train_step(resumed, step)
        for left, right in zip(snapshot(whole), snapshot(resumed), strict=True):
            assert_equal(left, right)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 2), (2, 0)])
def test_state_moves_between_stages(first: int, second: int) -> None:
    def ranks() -> None:
        one, two = make_engine(first), make_engine(second)
        train_step(one, 0)
        model, optimizer = snapshot(one)
        two.load_model_state(model)
        two.load_optimizer_state(optimizer)
        for mine, theirs in zip(snapshot(two), (model, optimizer), strict=True):
            assert_equal(mine, theirs)
        train_step(one, 1)
        train_step(two, 1)
        assert_close(trained_weights(two), trained_weights(one), rtol=1e-5, atol=1e-6)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [1, 3])
def test_state_before_the_first_step_is_zero_and_harmless(stage: int) -> None:
    def ranks() -> None:
        asked, plain = make_engine(stage), make_engine(stage)
        before = trained_weights(asked)
        state = snapshot(asked)[1]
        assert all(not value.any() for value in state.values())
        assert any(name.endswith("/step") for name in state)
        assert_equal(trained_weights(asked), before)
        train_step(asked, 0)
        train_step(plain, 0)
        for left, right in zip(snapshot(asked), snapshot(plain), strict=True):
            assert_equal(left, right)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_shared_out_and_masks_stay_bool(stage: int) -> None:
    def ranks() -> None:
        from torch.distributed.tensor import DTensor

        engine = make_engine(stage)
        train_step(engine, 0)
        state = engine.model_state() | engine.optimizer_state()
        name = "blocks.0.up.stages.mask.mask"
        assert state[name].dtype == torch.bool
        assert "head.weight" not in state
        assert "offset" in state
        trained = list(trained_weights(engine))
        for key in [*trained, *(f"{k}/exp_avg" for k in trained)]:
            assert isinstance(state[key], DTensor)
            assert state[key].dtype == torch.float32
            rows = state[key].shape[0]
            mine = -(-rows // WORLD) if engine.data_rank == 0 else rows // WORLD
            assert state[key].to_local().shape[0] == mine
        if stage == 3:  # sharded with the weight, not a whole copy a rank
            mask = engine.module.model.blocks[0].up.stages["mask"].mask
            assert mask.ds_tensor.numel() == INNER * HIDDEN // WORLD
            assert mask.ds_tensor.dtype == torch.bool

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 1)])
def test_checkpoint_loads_at_another_rank_count(first: int, second: int, tmp_path: Path) -> None:
    """Written by 2 ranks, read by 3 and by 1, whatever the stage."""
    from leanmill.checkpoint.config import CheckpointConfig
    from leanmill.checkpoint.manager import CheckpointManager

    def save() -> tuple[Values, Values]:
        engine = make_engine(first)
        train_step(engine, 0)
        manager = CheckpointManager(tmp_path, CheckpointConfig())
        manager.save(1, engine, {"tokens": 5}, {})
        # What is written is the state of that moment, though training goes on.
        state = snapshot(engine)
        train_step(engine, 1)
        manager.wait()
        return state

    def load() -> tuple[Values, Values]:
        engine = make_engine(second)
        manager = CheckpointManager(tmp_path, CheckpointConfig())
        path = manager.find("auto")
        assert path is not None
        assert manager.load(path, engine)["tokens"] == 5
        return snapshot(engine)

    saved = run_ranks(save, WORLD)[0]
    for world_size in (3, 1):
        for loaded in run_ranks(load, world_size):
            for left, right in zip(saved, loaded, strict=True):
                assert_equal(left, right)


def test_swapped_out_state_is_not_made_from_nothing() -> None:
    weight = nn.Parameter(torch.empty(0))
    wrapper = SimpleNamespace(
        optimizer=torch.optim.AdamW([weight]), swap_optimizer=True, fp32_partitioned_groups_flat=[weight]
    )
    with pytest.raises(RunError, match="device=cpu"):
        ZeroState(wrapper, stage=3).allocate()
