"""ZeRO stages against one plain process: gradients, weights, clipping, skipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.tiny import tiny
from tests.distributed import run_ranks
from tests.parallel.zero_cases import (
    MAX_NORM,
    MICRO,
    WORLD,
    Train,
    Values,
    adamw,
    assert_as_reference,
    assert_close,
    assert_equal,
    make_engine,
    micro_batch,
    num_valid,
    recorded,
    reference,
    snapshot,
    train_step,
    trained_weights,
)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_equals_one_process(stage: int, max_norm: float | None) -> None:
    """Unequal target counts per rank and micro-batch, accumulation, clipping: as one plain process."""

    def ranks() -> list[dict[str, Any]]:
        return recorded(make_engine(stage, max_norm=max_norm), 3, max_norm)

    for result in run_ranks(ranks, WORLD):
        assert_as_reference(result, reference(3, max_norm))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_skip_changes_nothing(stage: int) -> None:
    """A skipped step drops the gradients and leaves weights, state and counters bitwise alone."""

    def ranks() -> None:
        engine, other = make_engine(stage), make_engine(stage)
        for step in range(2):
            train_step(engine, step)
            train_step(other, step)
        for poison in (False, True):
            before = snapshot(engine)
            batches = [micro_batch(9, engine.data_rank, index) for index in range(MICRO)]
            # A zero divisor makes every gradient infinite or NaN on every rank.
            engine.forward_backward(batches, torch.tensor(0.0) if poison else num_valid(9))
            norm = engine.clip(MAX_NORM)
            assert bool(torch.isfinite(norm)) is not poison
            engine.step(torch.tensor(True))
            for mine, theirs in zip(snapshot(engine), before, strict=True):
                assert_equal(mine, theirs)
        # Had anything been left behind, the next step would differ.
        assert torch.equal(train_step(engine, 2), train_step(other, 2))
        assert_equal(trained_weights(engine), trained_weights(other))

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_with_nan_is_seen_by_all(stage: int) -> None:
    def ranks() -> tuple[Tensor, Values, Values]:
        engine = make_engine(stage)
        before = trained_weights(engine)
        batches = [micro_batch(0, engine.data_rank, index) for index in range(MICRO)]
        engine.forward_backward(batches, num_valid(0) * (math.nan if engine.data_rank == 1 else 1.0))
        norm = engine.clip(MAX_NORM)
        engine.step(~torch.isfinite(norm))
        return norm, before, trained_weights(engine)

    for norm, before, after in run_ranks(ranks, WORLD):
        assert not torch.isfinite(norm)
        assert_equal(before, after)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_base(stage: int) -> None:
    """Only the stages' parameters train; the base is bitwise what it was, and is in the state."""

    def build() -> nn.Module:
        return Train(freeze_base=True)

    def ranks() -> list[dict[str, Any]]:
        engine = make_engine(stage, build=build)
        before = engine.full_parameter("blocks.1.up.weight")
        records = recorded(engine, 2, MAX_NORM)
        assert torch.equal(engine.full_parameter("blocks.1.up.weight"), before)
        assert "blocks.1.up.weight" in engine.model_state()
        assert {k.partition("/")[0] for k in engine.optimizer_state()} == set(trained_weights(engine))
        return records

    for result in run_ranks(ranks, WORLD):
        assert_as_reference(result, reference(2, MAX_NORM, build))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_computes_in_bf16_and_keeps_fp32(stage: int) -> None:
    def ranks() -> list[dict[str, Any]]:
        engine = make_engine(stage, precision="bf16")
        seen: list[torch.dtype] = []
        engine.module.model.head.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        records = recorded(engine, 2, MAX_NORM)
        assert set(seen) == {torch.bfloat16}
        # Reduced and kept in fp32: more than bf16's 8 bits survive.
        assert all(not torch.equal(g, g.bfloat16().float()) for g in records[0]["gradients"].values())
        state = engine.model_state()
        assert {v.dtype for v in state.values()} == {torch.float32, torch.bool}
        return records

    want = reference(2, MAX_NORM)
    for result in run_ranks(ranks, WORLD):
        for mine, theirs in zip(result, want, strict=True):
            torch.testing.assert_close(mine["norm"], theirs["norm"], rtol=0.05, atol=0.0)
        for name, gradient in result[0]["gradients"].items():
            error = (gradient - want[0]["gradients"][name]).norm() / want[0]["gradients"][name].norm()
            assert error < 0.03, name


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["lion", "lookahead"])
def test_other_optimizers(stage: int, kind: str) -> None:
    """Optimizers of the recipe step flat partitions as they step parameters, and resume."""
    from leanmill.optim.lion import Lion
    from leanmill.optim.lookahead import Lookahead

    def make(module: nn.Module) -> torch.optim.Optimizer:
        if kind == "lion":
            return Lion(adamw(module).param_groups, lr=1e-3)
        return Lookahead(adamw(module), every=2, alpha=0.5)

    def ranks() -> None:
        engine, plain = make_engine(stage, optimizer=make), make_engine(0, optimizer=make)
        for step in range(3):
            train_step(engine, step)
            train_step(plain, step)
        assert_close(trained_weights(engine), trained_weights(plain), rtol=1e-4, atol=2e-5)
        fresh = make_engine(stage, optimizer=make)
        model, optimizer = snapshot(engine)
        fresh.load_model_state(model)
        fresh.load_optimizer_state(optimizer)
        train_step(fresh, 3)
        train_step(engine, 3)
        for left, right in zip(snapshot(fresh), snapshot(engine), strict=True):
            assert_equal(left, right)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluate_between_steps(stage: int) -> None:
    def ranks() -> None:
        engine, other = make_engine(stage), make_engine(stage)
        for step in range(2):
            train_step(engine, step)
            train_step(other, step)
            losses = engine.evaluate(micro_batch(50, 0, 0))
            assert engine.module.training
            assert not losses["total"].requires_grad
        assert torch.equal(losses["total"], other.evaluate(micro_batch(50, 0, 0))["total"])
        assert_equal(trained_weights(engine), trained_weights(other))

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_one_process_and_learning_rate(stage: int) -> None:
    """One rank works, `param_groups` is what the step reads, and engines can follow each other."""

    def ranks() -> None:
        for _ in range(2):
            engine = make_engine(stage)
            before = trained_weights(engine)
            for group in engine.param_groups:
                group["lr"] = 0.0
            train_step(engine, 0)
            assert_equal(trained_weights(engine), before)
            for group in engine.param_groups:
                group["lr"] = 1e-2
            train_step(engine, 0)
            after = trained_weights(engine)
            assert all(not torch.equal(after[name], before[name]) for name in before)
            engine.close()

    run_ranks(ranks, 1)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_frozen_model_is_sharded_where_weights_are(stage: int) -> None:
    """It computes what it does whole; the head, which a loss uses by itself, is whole on every rank."""
    ids = torch.arange(10).view(2, 5)

    def ranks() -> tuple[Tensor, dict[str, str]]:
        frozen = make_engine(stage).prepare_frozen(tiny())
        with torch.no_grad():
            logits = frozen(ids, use_cache=False).logits
        return logits, {name: type(p).__name__ for name, p in frozen.named_parameters()}

    for logits, kinds in run_ranks(ranks, WORLD):
        torch.testing.assert_close(logits, tiny()(ids, use_cache=False).logits.detach())
        assert kinds["model.layers.0.mlp.up_proj.weight"] == ("DTensor" if stage == 3 else "Parameter")
        assert kinds["lm_head.weight"] == "Parameter"
