"""When a run becomes sparse: pure functions of the step and the length of the run. Imports no torch.

Nothing here keeps a state, so a run that is resumed goes on where it stood, also inside a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol


class Masking(NamedTuple):
    """An N:M mask at one step."""

    num_kept: int
    """N."""
    group_size: int
    """M."""
    left: float
    """What pruned weights are multiplied with: 1 prunes nothing, 0 is the plain mask."""


class MaskSchedule(Protocol):
    """Which N:M mask a weight has at which step."""

    def at(self, step: int, num_steps: int) -> Masking:
        """Return the mask of a step.

        Args:
            step: From 0.
            num_steps: Of the run.
        """
        ...

    def patterns(self) -> Sequence[tuple[int, int]]:
        """Return every N and M that it comes by."""
        ...


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A part of a run, over before the run is."""

    begin: float
    """Share of the run before it."""
    end: float
    """Share of the run at its end; the last step of a run lies behind it in any case."""

    def progress(self, step: int, num_steps: int) -> float | None:
        """Return the share of it that is done, 0 in its first step and 1 behind it; None before."""
        first, last = self.begin * num_steps, min(self.end * num_steps, num_steps - 1)
        if step >= last:
            return 1.0
        return None if step < first else (step - first) / (last - first)

    def first_step(self, num_steps: int) -> int:
        """Return the first step in it."""
        return min(math.ceil(self.begin * num_steps), self.last_step(num_steps))

    def last_step(self, num_steps: int) -> int:
        """Return the first step behind it, whose progress is 1."""
        return max(0, math.ceil(min(self.end * num_steps, num_steps - 1)))


@dataclass(frozen=True, kw_only=True)
class DenseAtTheEnd:
    """One mask, and none towards the end (Hu et al. 2024, arXiv:2404.01847)."""

    num_kept: int
    group_size: int
    dense_share: float
    """Share of the run, to its end, without a mask."""

    def at(self, step: int, num_steps: int) -> Masking:
        is_dense = step >= (1 - self.dense_share) * num_steps
        return Masking(self.num_kept, self.group_size, 1.0 if is_dense else 0.0)

    def patterns(self) -> Sequence[tuple[int, int]]:
        return [(self.num_kept, self.group_size)]


@dataclass(frozen=True, kw_only=True)
class WarmedUp:
    """A strength that grows from 0, linearly over the first share of a run."""

    strength: float
    share: float = 0.0

    def at(self, step: int, num_steps: int) -> float:
        """Return it in a step, from 0; in a run of `num_steps`."""
        until = self.share * num_steps
        return self.strength if step >= until else self.strength * step / until


@dataclass(frozen=True, kw_only=True)
class GrowingSparsity:
    """A share of pruned weights that grows from s_i to s_f with the progress x.

    `cubic`: s = s_f + (s_i - s_f) (1 - x)^3 (Zhu and Gupta 2017, arXiv:1710.01878, eq. 1). `geometric`: what is left
    falls by the same factor from one time to the next, 1 - s = (1 - s_i)^(1 - x) (1 - s_f)^x (Misra et al. 2022,
    arXiv:2204.01640). It is asked for every so many steps from the first on, and at the end, so that s_f is reached
    whatever the two.
    """

    initial: float
    final: float
    interval: Interval
    every_steps: int
    growth: Literal["cubic", "geometric"] = "cubic"

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether masks are to have another sparsity after `step`."""
        first, last = self.interval.first_step(num_steps), self.interval.last_step(num_steps)
        return step == last or (first <= step < last and (step - first) % self.every_steps == 0)

    def sparsity(self, step: int, num_steps: int) -> float:
        """Return the share of weights that are pruned from then on."""
        progress = self.interval.progress(step, num_steps)
        if progress is None:
            return 0.0
        if self.growth == "geometric":
            return 1 - (1 - self.initial) ** (1 - progress) * (1 - self.final) ** progress
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


@dataclass(frozen=True, kw_only=True)
class MaskDecay:
    """MdGf (Bambhaniya et al. 2024, arXiv:2402.04744): pruned weights fade.

    With x the progress, they are multiplied with max(0, 1 - rate x), or exp(-rate x), and with 0 at the end. The
    paper's beta, a decay a step, is rate / steps of the interval.
    """

    num_kept: int
    group_size: int
    interval: Interval
    form: Literal["linear", "exponential"]
    rate: float

    def at(self, step: int, num_steps: int) -> Masking:
        progress = self.interval.progress(step, num_steps)
        return Masking(self.num_kept, self.group_size, 1.0 if progress is None else self._left(progress))

    def _left(self, progress: float) -> float:
        if progress == 1:
            return 0.0
        fall = self.rate * progress
        return max(0.0, 1 - fall) if self.form == "linear" else math.exp(-fall)

    def patterns(self) -> Sequence[tuple[int, int]]:
        return [(self.num_kept, self.group_size)]


@dataclass(frozen=True, kw_only=True)
class StructureDecay:
    """SdGf (Bambhaniya et al. 2024): plain masks whose N and M change, in stages of equal length.

    The last stage goes on to the end of the run.
    """

    stages: tuple[tuple[int, int], ...]
    interval: Interval

    def at(self, step: int, num_steps: int) -> Masking:
        progress = self.interval.progress(step, num_steps)
        if progress is None:
            return Masking(*self.stages[0], 1.0)
        number = min(len(self.stages) - 1, int(progress * len(self.stages)))
        return Masking(*self.stages[number], 0.0)

    def patterns(self) -> Sequence[tuple[int, int]]:
        return self.stages


def stepwise(num_kept: int, group_size: int) -> tuple[tuple[int, int], ...]:
    """Return the stages (M - 1):M, M/2:M, M/4:M and so on down to N:M.

    1:8 becomes 7:8, 4:8, 2:8, 1:8. Where N is no M / 2^i it follows the last one above it: 3:8 comes after 4:8.
    """
    halves = [group_size >> i for i in range(1, group_size.bit_length()) if group_size >> i > num_kept]
    kept = dict.fromkeys([group_size - 1, *halves, num_kept])
    return tuple((n, group_size) for n in kept)


def geometric(num_kept: int, group_size: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Return the stages 2^j N : 2^j M for j from `num_stages` - 1 down to 0: as many weights, ever finer groups."""
    return tuple((num_kept << j, group_size << j) for j in reversed(range(num_stages)))
