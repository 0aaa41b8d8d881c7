"""ZeRO with state outside of the device: in CPU memory and in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.distributed import run_ranks
from tests.parallel.zero_cases import (
    HIDDEN,
    MAX_NORM,
    MICRO,
    VOCAB,
    WORLD,
    Values,
    assert_as_reference,
    assert_close,
    assert_equal,
    make_engine,
    micro_batch,
    recorded,
    recorded_from,
    reference,
    snapshot,
    train_step,
    trained_weights,
)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload(stage: int) -> None:
    """Optimizer state, and parameters in stage 3, on the CPU, stepped by the recipe's own optimizer."""

    def ranks() -> list[dict[str, Any]]:
        engine = make_engine(stage, offload="cpu")
        records = recorded(engine, 2, MAX_NORM)
        before = snapshot(engine)
        engine.forward_backward([micro_batch(9, engine.data_rank, i) for i in range(MICRO)], torch.tensor(0.0))
        assert not torch.isfinite(engine.clip(MAX_NORM))
        engine.step(torch.tensor(True))
        for mine, theirs in zip(snapshot(engine), before, strict=True):
            assert_equal(mine, theirs)
        return [*records, *recorded_from(engine, 2, MAX_NORM)]

    for result in run_ranks(ranks, WORLD):
        assert_as_reference(result, reference(3, MAX_NORM))


class WideTrain(nn.Module):
    """A train module whose weights pass the 1 MiB a rank below which DeepSpeed keeps a tensor in memory."""

    def __init__(self, inner: int = 40_000) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = nn.Sequential(
                nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, inner), nn.Tanh(), nn.Linear(inner, VOCAB)
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Values:
        logits = self.model(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return {"total": loss, "cross_entropy": loss}


@pytest.mark.slow
def test_nvme_offload(tmp_path: Path) -> None:
    """Optimizer state and parameters in files, where libaio is installed: the steps of plain ZeRO-3."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("needs libaio")

    def ranks() -> None:
        engine = make_engine(3, offload="nvme", path=str(tmp_path), build=WideTrain)
        plain = make_engine(3, build=WideTrain)
        for step in range(3):
            torch.testing.assert_close(train_step(engine, step), train_step(plain, step))
        assert_close(trained_weights(engine), trained_weights(plain), rtol=1e-4, atol=1e-5)
        # All kinds of state: parameters, masters with their moments.
        for folder in ("float32params", "optimizer"):
            assert any((tmp_path / "zero_stage_3" / folder).rglob("*.swp")), folder
        for mine, theirs in zip(snapshot(engine), snapshot(plain), strict=True):
            assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    run_ranks(ranks, WORLD, timeout_seconds=900.0)
