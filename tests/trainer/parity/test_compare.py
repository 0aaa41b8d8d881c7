"""Ranks beside one process: what passes, what fails, and what a factor is called."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from leanmill.trainer.parity.compare import FP32, FP64, Difference, compare
from leanmill.trainer.parity.trace import Trace


def _trace() -> Trace:
    generator = torch.Generator().manual_seed(0)
    names = {"q.weight": "attention", "up.weight": "mlp", "mask": "mask"}

    def drawn(scale: float) -> dict[str, torch.Tensor]:
        found = {name: torch.randn(4, 3, generator=generator, dtype=torch.float64) * scale for name in names}
        return {**found, "mask": found["mask"] > 0}

    start, moved = drawn(1.0), drawn(0.1)
    weights = {name: start[name] + moved[name] if name != "mask" else start[name] for name in names}
    gradients = [{name: value for name, value in drawn(1.0).items() if name != "mask"} for _ in range(2)]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in step.values())) for step in gradients]
    return Trace(
        losses=[{"total": 2.0}, {"total": 1.5}],
        norms=norms,
        gradients=gradients,
        start=start,
        weights=weights,
        families=names,
    )


def _failed(change: Callable[[list[Trace]], None]) -> list[Difference]:
    wanted = _trace()
    found = [copy.deepcopy(wanted), copy.deepcopy(wanted)]
    change(found)
    return compare(wanted, found, bounds=FP64, sizes={"data ranks": 2, "ep": 4, "micro-batches": 3})[1]


def _scaled(family: str, factor: float, step: int = 0) -> Callable[[list[Trace]], None]:
    def change(found: list[Trace]) -> None:
        for trace in found:
            trace.gradients[step][family] = trace.gradients[step][family] * factor

    return change


def test_equal_ranks_pass() -> None:
    assert _failed(lambda found: None) == []


@pytest.mark.parametrize(
    ("factor", "name"),
    [(2.0, "scaled by data ranks"), (0.25, "scaled by 1 / ep"), (3.0, "scaled by micro-batches"), (0.0, "lost")],
)
def test_factors_have_names(factor: float, name: str) -> None:
    (one,) = _failed(_scaled("q.weight", factor))
    assert (one.quantity, one.family, one.step) == ("gradient", "attention", 0)
    assert one.ratio == pytest.approx(factor)
    assert name in one.reason


def test_what_follows_from_a_mistake_is_not_told() -> None:
    def change(found: list[Trace]) -> None:
        _scaled("q.weight", 2.0, step=0)(found)
        _scaled("up.weight", 5.0, step=1)(found)
        for trace in found:
            trace.weights["q.weight"] = trace.start["q.weight"]

    assert [one.family for one in _failed(change)] == ["attention"]


def test_weights_are_told_where_nothing_before_them_is_wrong() -> None:
    def change(found: list[Trace]) -> None:
        for trace in found:
            trace.weights["up.weight"] = trace.start["up.weight"]
            trace.weights["mask"] = ~trace.weights["mask"]

    failed = _failed(change)
    assert {(one.quantity, one.family) for one in failed} == {("weight", "mlp"), ("weight", "mask")}
    assert "lost" in next(one.reason for one in failed if one.family == "mlp")


def test_an_all_reduce_that_is_missing_is_told_from_ranks_that_differ() -> None:
    def halves(found: list[Trace]) -> None:
        noise = torch.randn(4, 3, dtype=torch.float64)
        found[0].gradients[0]["q.weight"] = found[0].gradients[0]["q.weight"] + noise
        found[1].gradients[0]["q.weight"] = found[1].gradients[0]["q.weight"] - noise

    (one,) = _failed(halves)
    assert "an all-reduce is missing" in one.reason

    def one_rank(found: list[Trace]) -> None:
        found[1].gradients[0]["q.weight"] = found[1].gradients[0]["q.weight"] * -2

    (one,) = _failed(one_rank)
    assert one.reason.startswith("ranks differ (")


def test_norms_of_parts_are_told() -> None:
    def change(found: list[Trace]) -> None:
        for trace, share in zip(found, (0.36, 0.64), strict=True):
            trace.norms = [norm * math.sqrt(share) for norm in trace.norms]

    (one,) = _failed(change)
    assert one.quantity == "norm"
    assert "the sum of their squares over ranks is missing" in one.reason


def test_what_is_not_a_number_or_not_there_fails() -> None:
    (one,) = _failed(_scaled("q.weight", math.nan))
    assert "not finite" in one.reason
    (one,) = _failed(lambda found: [trace.gradients[0].pop("q.weight") for trace in found] and None)
    assert (one.family, one.reason) == ("q.weight", "one process alone has it")
    (one,) = _failed(lambda found: found[1].losses[1].update(total=math.nan))
    assert (one.quantity, one.step) == ("loss", 1)


def test_rounding_of_a_stored_weight_passes_and_more_does_not() -> None:
    wanted = _trace()
    for values in (wanted.start, wanted.weights):
        values["up.weight"] = values["up.weight"].float()
    wanted.start["up.weight"] = wanted.weights["up.weight"] - 1e-5
    for times, passes in ((1, True), (100, False)):
        found = [copy.deepcopy(wanted)]
        found[0].weights["up.weight"] = wanted.weights["up.weight"] * (1 + times * torch.finfo(torch.float32).eps)
        _, failed = compare(wanted, found, bounds=FP32, sizes={})
        assert (failed == []) == passes
