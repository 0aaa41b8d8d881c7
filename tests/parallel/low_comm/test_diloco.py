"""DiLoCo against Algorithm 1 in plain tensors, in fp64, and what ranks wait for in between."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.parallel.low_comm.four_bits import decode, encode, num_bytes
from tests.distributed import run_ranks
from tests.parallel.cases import full_weights
from tests.parallel.low_comm.worker_cases import Plain, diloco, layout_of, train, workers_here


NUM_STEPS = 5
SLOW_FSDP, SLOW_DDP = (pytest.param(engine, 4, marks=pytest.mark.slow) for engine in ("fsdp", "ddp"))


def _trained(engine: str, **low_comm: object) -> tuple[dict[str, Tensor], int, list[tuple[int, ...]]]:
    outer = workers_here(engine, layout_of(**low_comm))
    groups = [dist.group.WORLD, outer.layout.across or dist.group.WORLD]
    counted = []
    for step in range(NUM_STEPS):
        before = [group._get_sequence_number_for_group() for group in groups]
        train(outer, step, step + 1, num_steps=NUM_STEPS)
        after = [group._get_sequence_number_for_group() for group in groups]
        counted.append(tuple(b - a for a, b in zip(before, after, strict=True)))
    weights = full_weights(outer.engine)
    return {name: weights[name] for name in outer._anchors}, outer.exchange.num_sent_bytes, counted


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_one_worker_that_meets_itself_in_every_step_trains_as_ever() -> None:
    options = {"workers": 1, "every_steps": 1, "lr": 1.0, "momentum": 0.0}
    plain = Plain(1)
    for step in range(NUM_STEPS):
        plain.inner_step(step)
    found, num_sent, _ = run_ranks(lambda: _trained("single", **options), 1)[0]
    _check(found, plain.weights(0))
    assert num_sent == 0


@pytest.mark.parametrize(("engine", "num_ranks"), [("single", 2), SLOW_FSDP, SLOW_DDP])
def test_two_workers_are_the_algorithm(engine: str, num_ranks: int) -> None:
    options = {"every_steps": 2, "lr": 0.7, "momentum": 0.9}
    expected = diloco(2, NUM_STEPS, **options, sent=lambda gradient: gradient)
    ranks = run_ranks(lambda: _trained(engine, workers=2, **options), num_ranks)
    for found, _, counted in ranks:
        _check(found, expected)
        # Of all ranks, and of those that hold the same, which where a worker is one rank are all: workers meet after
        # steps 2 and 4, and after the last.
        meeting = (int(num_ranks == 2), 1)
        assert counted == [(0, 0), meeting, (0, 0), meeting, meeting]


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "e3m0"])
def test_shorter_gradients_are_what_their_formula_says(dtype: str) -> None:
    def sent(gradient: Tensor) -> Tensor:
        if dtype == "bf16":
            return gradient.bfloat16().float()
        return decode(encode(gradient), gradient.numel()).view(gradient.shape)

    options = {"every_steps": 2, "lr": 0.7, "momentum": 0.9}
    expected = diloco(3, NUM_STEPS, **options, sent=sent)
    ranks = run_ranks(lambda: _trained("single", workers=3, gradient_dtype=dtype, **options), 3)
    sizes = [value.numel() for value in expected.values()]
    of_one = sum(map(num_bytes, sizes)) if dtype == "e3m0" else 2 * sum(sizes)
    for found, num_sent, _ in ranks:
        _check(found, expected, 1e-6)  # means are taken in fp32
        assert num_sent == 3 * 2 * of_one
