"""CO2's late outer steps in plain tensors, in fp64: the penalty is computed, and the momentum is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.parallel.low_comm.outer import OuterSteps
from tests.distributed import run_ranks
from tests.parallel.cases import full_weights
from tests.parallel.low_comm.worker_cases import Plain, layout_of, train, workers_here


NUM_STEPS, EVERY = 7, 2
LR, MOMENTUM, CLIP = 0.9, 0.5, 0.01
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("single", 2, False), ("fsdp", 4, True))]


def _co2(gap_penalty: bool) -> tuple[dict[str, Tensor], list[float], bool]:
    """The anchors after a run, each penalty, and whether anything was cut."""
    plain = Plain(2)
    anchors = {name: value.clone() for name, value in plain.weights(0).items()}
    momenta = {name: torch.zeros_like(value) for name, value in anchors.items()}
    coming: list[dict[str, Tensor]] = []
    lengths: list[float] = []
    penalties: list[float] = []
    was_cut = False

    def send() -> None:
        went = {name: sum(anchors[name] - plain.weights(w)[name] for w in (0, 1)) / 2 for name in anchors}
        coming.append(went)  # type: ignore[arg-type]

    def step(gradients: dict[str, Tensor]) -> None:
        nonlocal was_cut
        penalty = 1 + lengths[-1] / (sum(lengths) / len(lengths)) if lengths and gap_penalty else 1.0
        penalties.append(penalty)
        squares = 0.0
        for name, gradient in gradients.items():
            momentum = MOMENTUM * momenta[name] + gradient / penalty
            was_cut |= bool((momentum.abs() > CLIP).any())
            momenta[name] = momentum.clamp(-CLIP, CLIP)
            squares += float((LR * momenta[name]).square().sum())
            anchors[name] = anchors[name] - LR * momenta[name]
        lengths.append(squares**0.5)

    for index in range(1, NUM_STEPS + 1):
        plain.inner_step(index - 1)
        if index % EVERY and index < NUM_STEPS:
            continue
        send()
        while len(coming) > (0 if index == NUM_STEPS else 1):
            step(coming.pop(0))
        for worker in (0, 1):
            for name, weight in plain.weights(worker).items():
                weight.copy_(anchors[name])
    return anchors, penalties, was_cut


def _workers(engine: str, gap_penalty: bool) -> OuterSteps:
    options: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "momentum_clip": CLIP, "gap_penalty": gap_penalty}
    return workers_here(engine, layout_of(workers=2, every_steps=EVERY, **options))


@pytest.mark.parametrize(("engine", "num_ranks", "gap_penalty"), [("single", 2, True), *SLOW])
def test_two_workers_are_the_algorithm(engine: str, num_ranks: int, gap_penalty: bool) -> None:
    def body() -> dict[str, Tensor]:
        outer = _workers(engine, gap_penalty)
        train(outer, 0, NUM_STEPS, num_steps=NUM_STEPS)
        weights = full_weights(outer.engine)
        return {name: weights[name] for name in outer._anchors}

    expected, penalties, was_cut = _co2(gap_penalty)
    assert was_cut
    assert (max(penalties) > 1.5) == gap_penalty
    for found in run_ranks(body, num_ranks):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-7, atol=2e-7, msg=name)  # lengths are fp32


def test_a_resume_while_an_interval_travels_is_bitwise(tmp_path: Path) -> None:
    def body() -> list[str]:
        whole, resumed = (_workers("single", True) for _ in range(2))
        train(whole, 0, 5, num_steps=NUM_STEPS)
        rank = dist.get_rank() % whole.layout.step_size
        manager = CheckpointManager(tmp_path, CheckpointConfig(asynchronous=False), worker=(whole.worker, rank))
        manager.save(5, whole, {"step": 5}, {})
        manager.load(tmp_path / "checkpoints/step-00000005", resumed)
        for outer in (whole, resumed):
            train(outer, 5, NUM_STEPS, num_steps=NUM_STEPS)
        assert whole.metrics()["low_comm/gap_penalty"] == resumed.metrics()["low_comm/gap_penalty"] > 1
        first, second = (outer.worker_state() | outer.outer_state() | outer.model_state() for outer in (whole, resumed))
        return [name for name, value in first.items() if not torch.equal(_local(value), _local(second[name]))]

    assert run_ranks(body, 2) == [[]] * 2


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
