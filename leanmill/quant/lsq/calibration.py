"""How learned step sizes and offsets of activations get their start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import RunError
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, make_grid
from leanmill.parallel.collectives import max_over_ranks, sum_over_ranks
from leanmill.quant.grids import UniformGrid
from leanmill.quant.lsq.activations import LsqActivations


NUM_BINS = 2048
"""Of the histogram in which the squared error of a grid is looked up."""
NUM_ENDS = 20
"""Places that either end of a grid may have, the outermost at the extreme and others towards the mean."""


class CalibrateSteps(BatchRule):
    """Starts every step size of activations from the first global batch.

    That is 2 mean |x| / sqrt(Qp), as LSQ does; with an offset the step and offset with the least squared error
    (LSQ+), of grids whose ends lie between the mean and the extremes. One forward in eval mode, for offsets a
    second, in which no activation is rounded; what is counted is counted over all ranks, so the start is the
    same on any number of them, whatever the micro-batches.
    """

    name = "lsq"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._is_done = False

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        if not self._is_done:
            self._calibrate(batches, score)
            self._is_done = True
        return batches

    def _calibrate(self, batches: Sequence[Batch], score: Score) -> None:
        stages = {
            site.site_name: stage
            for _, site in iter_sites(self.model)
            for stage in site.input_stages()
            if isinstance(stage, LsqActivations) and not stage.initial
        }
        if not stages:  # another rule was first
            return
        extents = [_Extent(stage.initial.device) for stage in stages.values()]
        _watch(list(stages.values()), extents, batches, score)
        sums = sum_over_ranks(torch.stack([extent.sums for extent in extents]))
        ends = max_over_ranks(torch.stack([extent.ends for extent in extents]))
        for (name, stage), (total, number) in zip(stages.items(), sums.tolist(), strict=True):
            _check_observed(name, total, number)
            stage.begin_at(max(2 * total / number / stage.grid.largest_code**0.5, SMALLEST_SCALE), 0.0)
        with_offset = [(stage, end.tolist()) for stage, end in zip(stages.values(), ends, strict=True)]
        _calibrate_offsets([pair for pair in with_offset if pair[0].has_offset], batches, score)

    def state_dict(self) -> dict[str, Any]:
        return {"is_calibrated": self._is_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._is_done = bool(state["is_calibrated"])


def _calibrate_offsets(
    stages: Sequence[tuple[LsqActivations, list[float]]], batches: Sequence[Batch], score: Score
) -> None:
    """Start steps and offsets of stages, given with the negative of the least and the largest that each was shown."""
    if not stages:
        return
    histograms = [_Histogram(-end[0], end[1], stage.initial.device) for stage, end in stages]
    _watch([stage for stage, _ in stages], histograms, batches, score)
    counts = sum_over_ranks(torch.stack([histogram.counts for histogram in histograms]))
    for (stage, _), histogram, count in zip(stages, histograms, counts, strict=True):
        stage.begin_at(*least_error(count, histogram.least, histogram.largest, stage.grid))


def _watch(
    stages: Sequence[LsqActivations],
    watchers: Sequence[Callable[[Tensor], None]],
    batches: Sequence[Batch],
    score: Score,
) -> None:
    for stage, watcher in zip(stages, watchers, strict=True):
        stage.watch = watcher
    try:
        # Not in a compiled graph: it would be one more, for this step alone.
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                score(batch)
    finally:
        for stage in stages:
            stage.watch = None


def _check_observed(name: str, total: float, number: float) -> None:
    if not number:
        raise RunError(
            f"no activation reached {name} in the first step, so lsq has no step size to start from; "
            f"add {name!r} to lsq.exclude"
        )
    if not total < float("inf"):
        raise RunError(
            f"activations that reach {name} are not finite in the first step, so lsq has no step size to start from; "
            f"look at the weights that the run starts from"
        )


class _Extent:
    """Sums magnitudes and their number, fp64 [2], and finds the extremes: minus the least, and the largest."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.ends = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)

    def __call__(self, tokens: Tensor) -> None:
        total = tokens.abs().sum(dtype=torch.float64)
        self.sums += torch.stack([total, torch.full_like(total, tokens.numel())])
        if tokens.numel():
            least, largest = tokens.aminmax()
            self.ends = torch.maximum(self.ends, torch.stack([-least, largest]).double())


class _Histogram:
    """Counts values in bins between two extremes, fp64."""

    def __init__(self, least: float, largest: float, device: torch.device) -> None:
        self.least, self.largest = least, largest
        self.counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=device)

    def __call__(self, tokens: Tensor) -> None:
        if self.least < self.largest:
            # Counts are fp32, which adds nothing to 2^24 any more.
            for part in tokens.flatten().split(1 << 24):
                self.counts += torch.histc(part.float(), NUM_BINS, self.least, self.largest)


def least_error(counts: Tensor, least: float, largest: float, grid: UniformGrid) -> tuple[float, float]:
    """Return the step and the offset of the grid with the least squared error over a histogram.

    Args:
        counts: [NUM_BINS], how often values lie in each of equal bins from `least` to `largest`.
        least: Least value.
        largest: Largest value.
        grid: Its codes are stretched between two ends, each between an extreme and the mean.
    """
    codes = make_grid(grid.num_bits, grid.kind)
    if not least < largest:  # one value is a level
        return SMALLEST_SCALE, least
    centres = least + (largest - least) * (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS
    weights = counts.cpu()
    mean = float((weights * centres).sum() / weights.sum())
    shares = torch.arange(NUM_ENDS, dtype=torch.float64) / NUM_ENDS
    low, high = torch.cartesian_prod(least + shares * (mean - least), largest - shares * (largest - mean)).unbind(-1)
    steps = ((high - low) / (codes.high - codes.low)).clamp(min=SMALLEST_SCALE).unsqueeze(-1)
    offsets = low.unsqueeze(-1) - codes.low * steps
    rounded = grid.rounded(centres.expand(len(steps), -1), steps, offsets)
    best = int(((rounded - centres).square() * weights).sum(-1).argmin())
    return float(steps[best]), float(offsets[best])
