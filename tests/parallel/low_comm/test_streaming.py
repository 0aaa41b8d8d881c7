"""Streaming DiLoCo against Algorithm 2, a weight at a time in fp64; which fragments there are and when they travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.parallel.low_comm.outer import OuterSteps
from leanmill.parallel.low_comm.schedule import Schedule
from tests.distributed import run_ranks
from tests.parallel.cases import full_weights
from tests.parallel.low_comm.worker_cases import layout_of, streaming, train, workers_here


NUM_STEPS = 7
OPTIONS = {"lr": 0.4, "momentum": 0.9}
SENT_AFTER = {"layers.0.": 2, "layers.1.": 0, "": 1}
"""Steps of every four; of blocks, and of what is in none."""


def _workers(engine: str, tau: int, alpha: float, dtype: str = "fp32") -> OuterSteps:
    layout = layout_of(
        workers=2,
        every_steps=4,
        layers_per_fragment=1,
        overlap_steps=tau,
        keep_local=alpha,
        gradient_dtype=dtype,
        **OPTIONS,
    )
    return workers_here(engine, layout)


@pytest.mark.parametrize(
    ("engine", "num_ranks", "tau", "alpha"),
    [pytest.param("single", 2, 0, 0.25, marks=pytest.mark.slow), ("fsdp", 4, 2, 0.5)],
)
def test_two_workers_are_the_algorithm(engine: str, num_ranks: int, tau: int, alpha: float) -> None:
    def body() -> tuple[dict[str, Tensor], list[int]]:
        outer = _workers(engine, tau, alpha)
        numbers = []
        for step in range(NUM_STEPS):
            before = dist.group.WORLD._get_sequence_number_for_group()
            train(outer, step, step + 1, num_steps=NUM_STEPS)
            numbers.append(dist.group.WORLD._get_sequence_number_for_group() - before)
        weights = full_weights(outer.engine)
        return {name: weights[name] for name in outer._anchors}, numbers

    expected = streaming(2, NUM_STEPS, SENT_AFTER, tau=tau, alpha=alpha, **OPTIONS)
    for found, numbers in run_ranks(body, num_ranks):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)
        # Where a worker is one rank, those that hold the same are all ranks.
        assert numbers == ([1, 1, 0, 1, 1, 1, 3] if num_ranks == 2 else [0] * NUM_STEPS)


def test_a_resume_while_a_fragment_travels_is_bitwise(tmp_path: Path) -> None:
    def body() -> list[str]:
        whole, resumed = (_workers("single", 2, 0.5, "e3m0") for _ in range(2))
        train(whole, 0, 3, num_steps=NUM_STEPS)  # the first block is sent after 2 steps, and due after 4
        rank = dist.get_rank() % whole.layout.step_size
        manager = CheckpointManager(tmp_path, CheckpointConfig(asynchronous=False), worker=(whole.worker, rank))
        manager.save(3, whole, {"step": 3}, {})
        manager.load(tmp_path / "checkpoints/step-00000003", resumed)
        for outer in (whole, resumed):
            train(outer, 3, NUM_STEPS, num_steps=NUM_STEPS)
        first, second = (outer.worker_state() | outer.outer_state() | outer.model_state() for outer in (whole, resumed))
        assert first.keys() == second.keys()
        return [name for name, value in first.items() if not torch.equal(_local(value), _local(second[name]))]

    assert run_ranks(body, 2) == [[]] * 2
    saved = read_full_state(tmp_path / "checkpoints/step-00000003", "outer")
    under_way = {name for name in saved if name.endswith("/mean")}
    assert under_way
    assert all("layers.0." in name for name in under_way)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_fragments_take_turns_and_the_last_comes_after_a_whole_interval() -> None:
    schedule = Schedule(3, 10)
    assert {step: found for step in range(1, 21) if (found := schedule.sent_after(step))} == {
        3: [0], 6: [1], 10: [2], 13: [0], 16: [1], 20: [2],
    }  # fmt: skip
    assert [schedule.last_sent(0, step) for step in (2, 3, 12, 13)] == [-7, 3, 3, 13]
    with pytest.raises(
        ConfigError, match=r"every_steps=2 is less than the 3 fragments .* set layout.low_comm.every_steps=3"
    ):
        Schedule(3, 2)


def test_fragments_are_strided_and_hold_everything_once() -> None:
    def body() -> list[list[str]]:
        layout = layout_of(workers=1, every_steps=4, layers_per_fragment=2, keep_local=0.0, overlap_steps=1)
        return [list(fragment.names) for fragment in workers_here("fsdp", layout).fragments]

    rest, blocks = run_ranks(body, 1)[0]
    assert "model.embed_tokens.weight" in rest
    assert "model.norm.weight" in rest
    assert {name.split(".")[2] for name in blocks} == {"0", "1"}
    assert not set(rest) & set(blocks)
