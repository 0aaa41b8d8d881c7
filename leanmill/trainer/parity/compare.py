"""Many ranks beside one process: how far off, by what factor, and which mistake has that factor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from leanmill.trainer.parity.trace import Trace, Values


Quantity = Literal["loss", "gradient", "norm", "weight"]
SMALLEST_SHARE = 1e-2
"""A parameter whose gradient is a smaller share of all gradients is held against that share: some are zero but for
rounding, a bias of keys say."""
_SAME_FACTOR = 0.01
_ROUNDINGS = 2
"""Of a stored weight that a few steps may add up to: a norm's, near 1, moves little."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The largest relative differences that pass."""

    loss: float
    gradient: float
    norm: float
    weight: float
    """Of the change since the first step, which is stricter than of the weight."""


FP64 = Bounds(loss=1e-6, gradient=1e-9, norm=1e-6, weight=1e-9)
"""Losses and norms are handed out in fp32."""
FP32 = Bounds(loss=2e-5, gradient=2e-5, norm=2e-5, weight=2e-5)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity of one family of parameters, the worst over its parameters and over ranks."""

    quantity: Quantity
    family: str
    """Of parameters; of a loss its name; `all` of the norm."""
    step: int
    """From 0; weights are those after the last step, whose number is one more."""
    error: float
    """Relative."""
    ratio: float
    """What the ranks have in units of what one process has: the factor of least squares."""
    reason: str = ""
    """What it looks like, where it is above its bound; else ""."""


def compare(
    wanted: Trace, found: Sequence[Trace], *, bounds: Bounds, sizes: Mapping[str, int]
) -> tuple[list[Difference], list[Difference]]:
    """Hold the ranks of a run beside one process.

    Args:
        wanted: Of one process.
        found: By rank.
        bounds: What may differ.
        sizes: By what people call them, numbers that a wrong factor may be: `data ranks`, `ep`, `micro-batches`.

    Returns:
        Every quantity at its worst step; and what is above its bound in the first step where anything is, since all
        that comes after it follows from it.
    """
    judge = _Judge(wanted, found, sizes)
    every = [
        *judge.losses(bounds.loss),
        *judge.gradients(bounds.gradient),
        *judge.norms(bounds.norm),
        *judge.weights(bounds.weight),
    ]
    failed = [one for one in every if one.reason]
    first = min((one.step for one in failed), default=0)
    worst: dict[tuple[str, str], Difference] = {}
    for one in every:
        known = worst.setdefault((one.quantity, one.family), one)
        if not one.error <= known.error:
            worst[one.quantity, one.family] = one
    return list(worst.values()), [one for one in failed if one.step == first]


class _Judge:
    def __init__(self, wanted: Trace, found: Sequence[Trace], sizes: Mapping[str, int]) -> None:
        self._wanted, self._found, self._sizes = wanted, found, sizes

    def losses(self, bound: float) -> Iterator[Difference]:
        for step, values in enumerate(self._wanted.losses):
            for name, value in values.items():
                mine = [trace.losses[step].get(name, math.nan) for trace in self._found]
                yield self._of_numbers("loss", name, step, mine, value, bound)

    def norms(self, bound: float) -> Iterator[Difference]:
        for step, value in enumerate(self._wanted.norms):
            mine = [trace.norms[step] for trace in self._found]
            one = self._of_numbers("norm", "all", step, mine, value, bound)
            if one.reason and max(mine) - min(mine) > bound * max(mine):
                is_split = _relative(math.sqrt(sum(norm**2 for norm in mine)), value) <= _SAME_FACTOR
                missing = ", each that of its own part: the sum of their squares over ranks is missing"
                one = replace(one, reason=f"ranks have different norms{missing if is_split else ''}")
            yield one

    def gradients(self, bound: float) -> Iterator[Difference]:
        for step, values in enumerate(self._wanted.gradients):
            parts = [trace.gradients[step] for trace in self._found]
            yield from _missing(values, parts[0], "gradient", step)
            for family, names in self._by_family(values, parts).items():
                yield self._of_tensors("gradient", family, step, names, values, parts, bound)

    def weights(self, bound: float) -> Iterator[Difference]:
        weights, start, step = self._wanted.weights, self._wanted.start, len(self._wanted.norms)
        yield from _missing(weights, self._found[0].weights, "weight", step)
        moved, parts = _moved(weights, start), [_moved(trace.weights, start) for trace in self._found]
        rounding = {name: _ROUNDINGS * torch.finfo(weights[name].dtype).eps * _norm([weights[name]]) for name in moved}
        for family, names in self._by_family(moved, parts).items():
            yield self._of_tensors("weight", family, step, names, moved, parts, bound, rounding)
        for name in weights.keys() - moved.keys():
            if any(not torch.equal(trace.weights[name], weights[name]) for trace in self._found):
                family = self._wanted.families[name]
                yield Difference(
                    quantity="weight", family=family, step=step, error=1.0, ratio=math.nan, reason=f"{name} differs"
                )

    def _by_family(self, values: Values, parts: Sequence[Values]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in values:
            if all(name in mine for mine in parts):
                found[self._wanted.families.get(name, "other")].append(name)
        return found

    def _of_numbers(
        self, quantity: Quantity, name: str, step: int, found: Sequence[float], wanted: float, bound: float
    ) -> Difference:
        errors = [_relative(one, wanted) for one in found]
        error = max(errors, key=lambda one: math.inf if math.isnan(one) else one)
        ratio = found[errors.index(error)] / wanted if wanted else math.nan
        reason = "" if error <= bound else self._named(ratio)
        return Difference(quantity=quantity, family=name, step=step, error=error, ratio=ratio, reason=reason)

    def _of_tensors(
        self,
        quantity: Quantity,
        family: str,
        step: int,
        names: Sequence[str],
        wanted: Values,
        parts: Sequence[Values],
        bound: float,
        rounding: Mapping[str, float] = MappingProxyType({}),
    ) -> Difference:
        """Hold the parameters of a family beside those of one process; `rounding` passes besides the bound."""
        floor = SMALLEST_SHARE * _norm(list(wanted.values()))
        error, worst, fails = 0.0, "", False
        for name in names:
            scale = max(_norm([wanted[name]]), floor) or 1.0
            for mine in parts:
                off = _norm([mine[name].double() - wanted[name].double()])
                is_too_far = not off <= bound * scale + rounding.get(name, 0.0)  # NaN is too far
                if (is_too_far, off / scale) > (fails, error) or not math.isfinite(off):
                    error, worst, fails = off / scale, name, is_too_far
        whole, means = [wanted[name] for name in names], [_mean(parts, name) for name in names]
        ratio, residual = _least_squares(whole, means)
        reason = ""
        if fails:
            reason = self._why(names, whole, parts, ratio, residual, bound)
            reason += f" (worst: {worst})"
        return Difference(quantity=quantity, family=family, step=step, error=error, ratio=ratio, reason=reason)

    def _why(
        self,
        names: Sequence[str],
        whole: Sequence[Tensor],
        parts: Sequence[Values],
        ratio: float,
        residual: float,
        bound: float,
    ) -> str:
        if not math.isfinite(ratio):
            return "not finite"
        spread = _norm([part[name].double() - parts[0][name].double() for part in parts for name in names])
        if spread > max(bound, 1e-6) * _norm(whole):
            is_mean = residual <= _SAME_FACTOR and _relative(ratio, 1.0) <= _SAME_FACTOR
            return "ranks differ, and their mean is right: an all-reduce is missing" if is_mean else "ranks differ"
        return self._named(ratio) if residual <= _SAME_FACTOR else "another one, no multiple of it"

    def _named(self, ratio: float) -> str:
        """Say which of the sizes a factor is."""
        if not math.isfinite(ratio):
            return "not finite"
        if ratio == 0:
            return "lost: it is 0"
        if _relative(ratio, 1.0) <= _SAME_FACTOR:
            return "of the right size, and further off than rounding explains"
        sizes = {name: size for name, size in self._sizes.items() if size > 1}
        found = [name for name, size in sizes.items() if _relative(ratio, size) <= _SAME_FACTOR]
        found += [f"1 / {name}" for name, size in sizes.items() if _relative(ratio, 1 / size) <= _SAME_FACTOR]
        return f"scaled by {' or '.join(found)}" if found else f"scaled by {ratio:.4g}"


def _moved(weights: Values, start: Values) -> Values:
    return {name: value.double() - start[name].double() for name, value in weights.items() if value.is_floating_point()}


def _missing(wanted: Values, found: Values, quantity: Quantity, step: int) -> Iterator[Difference]:
    for name in sorted(wanted.keys() ^ found.keys()):
        whose = "one process alone has it" if name in wanted else "ranks alone have it"
        yield Difference(quantity=quantity, family=name, step=step, error=math.inf, ratio=math.nan, reason=whose)


def _least_squares(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """Return the factor r that brings r x wanted nearest to found, and what is left, relative."""
    square = sum(float(one.double().square().sum()) for one in wanted)
    if not square:
        return math.nan, math.inf
    pairs = list(zip(wanted, found, strict=True))
    ratio = sum(float((mine.double() * one.double()).sum()) for one, mine in pairs) / square
    left = sum(float((mine.double() - ratio * one.double()).square().sum()) for one, mine in pairs)
    size = sum(float(mine.double().square().sum()) for mine in found)
    return ratio, math.sqrt(left / size) if size else 0.0


def _mean(parts: Sequence[Values], name: str) -> Tensor:
    return torch.stack([part[name].double() for part in parts]).mean(0)


def _norm(values: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted) if wanted else abs(found)
