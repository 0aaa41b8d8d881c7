"""A mask by thresholds that are trained, as a stage."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.facets import PartStaging
from leanmill.core.stage import Slot, Stage


class LearnedThreshold(Stage):
    """Zero the weights [..., out, in] whose magnitude is below the threshold of their row, or of their matrix.

    With Q = |W| - t the mask is 1 where Q >= 0, and its derivative is taken as

        H(Q) = 2 - 4 |Q| up to |Q| = 0.4,  0.4 up to |Q| = 1,  and 0 beyond

    (Liu et al. 2020), so that dL/dW = g (M + |W| H(Q)) and dL/dt = -sum of g W H(Q) over what shares t, g the gradient
    of what is returned. What shares a threshold keeps its largest weights whatever it is; the gradient of t is that at
    their magnitude. Where the paper resets the thresholds of a layer that would keep less than 1 %, nothing is needed.

    Args:
        weight: The weight it will be given: shape, device and dtype are taken.
        share: What has one threshold: an output row, or a matrix (each expert of a stacked one).
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "learned_threshold"
    once_a_step: ClassVar[bool] = True
    threshold: nn.Parameter
    """[..., out, 1] or [..., 1, 1], at least fp32."""

    def __init__(self, weight: Tensor, share: Literal["row", "matrix"] = "row") -> None:
        super().__init__()
        self.share = share
        shape = (*weight.shape[:-1], 1) if share == "row" else (*weight.shape[:-2], 1, 1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.threshold = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.threshold.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        return _AboveThreshold.apply(weight, self.threshold)  # type: ignore[no-any-return]

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        # A matrix may lie on two ranks, but none of a stack does.
        return None if self.share == "matrix" and len(shape) == 2 else self.by_itself(part)

    def extra_repr(self) -> str:
        return f"share={self.share!r}"


def _sharing(weight: Tensor, threshold: Tensor) -> tuple[int, ...]:
    """Dims of what shares a threshold."""
    return (-1,) if threshold.shape[-2] == weight.shape[-2] else (-2, -1)


def distance(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return |W| - t in the threshold's dtype, t at most the largest |W| that shares it; NaN where W is no number."""
    magnitude = weight.to(threshold.dtype).abs()
    return magnitude - torch.minimum(threshold, magnitude.amax(_sharing(weight, threshold), keepdim=True))


class _AboveThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(weight, threshold)
        # What is no number is kept, so that it is seen.
        return torch.where(distance(weight, threshold) < 0, weight.new_zeros(()), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight, threshold = ctx.saved_tensors
        beyond = distance(weight, threshold)
        size = beyond.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, 0.4).masked_fill(size > 1, 0.0)
        exact = grad.to(threshold.dtype)
        to_weight = exact * ((beyond >= 0) + weight.abs() * slope)
        to_threshold = -(exact * weight * slope).sum(_sharing(weight, threshold), keepdim=True)
        return to_weight.to(weight.dtype), to_threshold
