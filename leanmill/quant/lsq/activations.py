"""Learned step sizes of activations as an input stage, and how they get their start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import RunError
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.core.stage import InputSlot, InputStage
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, make_grid
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.parallel.collectives import sum_over_ranks


class LsqActivations(InputStage):
    """Round activations [..., in] to a grid with one trained step; gradients of value and step are LSQ's.

    The step is `initial` + `moved`. `CalibrateSteps` writes the first, a buffer, which engines that keep
    masters of parameters would not let it do to a parameter; the second is trained from 0. Before that,
    everything is NaN.

    Args:
        num_features: `in`, N of the gradient scale 1 / sqrt(N Qp).
        num_bits: 2 to 8.
        grid: `signed`, or `unsigned` for activations that are never negative.
        device: Of the weight.
    """

    slot: ClassVar[InputSlot] = InputSlot.QUANT
    technique: ClassVar[str] = "lsq"
    initial: Tensor
    """(1,) fp32; 0 until it is known."""

    def __init__(
        self,
        num_features: int,
        num_bits: int,
        grid: Literal["signed", "unsigned"] = "signed",
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.num_bits, self.grid = num_features, num_bits, grid
        self.largest_code = make_grid(num_bits, grid).high
        self.moved = nn.Parameter(torch.zeros(1, device=device))
        self.register_buffer("initial", torch.zeros(1, device=device))
        self.observed: Tensor | None = None
        """fp64 [2] while activations are observed, and passed on as they are: sum of magnitudes, and their number."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.observed is not None:
            total = tokens.detach().abs().sum(dtype=torch.float64)
            self.observed += torch.stack([total, torch.full_like(total, tokens.numel())])
            return tokens
        step = self.initial.masked_fill(self.initial == 0, torch.nan) + self.moved
        grad_scale = (self.num_features * self.largest_code) ** -0.5
        return fake_quant(tokens, step, num_bits=self.num_bits, grid=self.grid, grad_scale=grad_scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.moved.zero_()
        self.initial.zero_()

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, grid={self.grid}"


class CalibrateSteps(BatchRule):
    """Starts every step size of activations at 2 mean |x| / sqrt(Qp) over the first global batch.

    One forward in eval mode, in which no activation is rounded; sums are fp64 and over all ranks, so the
    start is the same on any number of them, whatever the micro-batches.
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
        for stage in stages.values():
            stage.observed = torch.zeros(2, dtype=torch.float64, device=stage.initial.device)
        try:
            # Not in a compiled graph: it would be one more, for this step alone.
            with torch.compiler.set_stance("force_eager"):
                for batch in batches:
                    score(batch)
            observed = sum_over_ranks(torch.stack([_observed(stage) for stage in stages.values()]))
        finally:
            for stage in stages.values():
                stage.observed = None
        for (name, stage), (total, number) in zip(stages.items(), observed.tolist(), strict=True):
            if not number:
                raise RunError(
                    f"no activation reached {name} in the first step, so lsq has no step size to start from; "
                    f"add {name!r} to lsq.exclude"
                )
            stage.initial.fill_(max(2 * total / number / stage.largest_code**0.5, SMALLEST_SCALE))

    def state_dict(self) -> dict[str, Any]:
        return {"is_calibrated": self._is_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._is_done = bool(state["is_calibrated"])


def _observed(stage: LsqActivations) -> Tensor:
    assert stage.observed is not None
    return stage.observed
