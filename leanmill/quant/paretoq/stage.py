"""ParetoQ's grids as stages, each with one trained scale alpha an output row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.core.facets import Codes, LearnedGrid
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE
from leanmill.quant.grids import UniformGrid
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import LearnedScale


GRIDS: dict[float, tuple[UniformGrid, float]] = {
    1.58: (UniformGrid(2, "stretched"), 1.5),
    2: (UniformGrid(2, "midrise"), 2.0),
    3: (UniformGrid(3, "signed"), 1.0),
    4: (UniformGrid(4, "signed"), 1.0),
}
"""By bits, the grid and how many of its steps alpha is."""


def make_stage(weight: Tensor, num_bits: float, *, has_warmup: bool = False) -> LearnedScale:
    """Return the stage of so many bits for a weight [..., out, in], of which shape and device are taken."""
    if num_bits == 1:
        return SignStage(weight, has_warmup=has_warmup)
    return StretchedStage(weight, num_bits, has_warmup=has_warmup)


class StretchedStage(LearnedScale):
    """Round a weight [..., out, in] to levels that share [-alpha, alpha] evenly, or to LSQ's with step alpha.

    As in the paper's code alpha starts at the largest magnitude of its row (over the largest code for 3 and 4
    bits), and its gradient is divided by sqrt(N Qp), N the weights of the matrix and not of the row. The
    code ends the value's gradient at 0.99 alpha, this at alpha.

    Args:
        weight: The weight it will be given: shape and device are taken.
        num_bits: 1.58, 2, 3 or 4.
        has_warmup: See `WarmedUp`.
    """

    technique: ClassVar[str] = "paretoq"

    def __init__(self, weight: Tensor, num_bits: float, *, has_warmup: bool = False) -> None:
        grid, self.steps = GRIDS[num_bits]
        super().__init__(weight, grid, Sharing("row"), has_warmup=has_warmup)
        self.grad_scale = matrix_grad_scale(weight, grid.largest_code)

    def rounded(self, weight: Tensor) -> Tensor:
        # d/d alpha is 1 / steps of d/d step, as in the paper's code.
        return self.grid.rounded(weight, self.scale / self.steps, grad_scale=self.grad_scale)

    def codes(self, weight: Tensor) -> Codes | None:
        return None if self.is_mixed else self.grid.codes(weight, self.scale / self.steps)

    def learned_grid(self) -> LearnedGrid | None:
        return None  # its gradient has another divisor

    def start(self, weight: Tensor) -> Tensor:
        largest = weight.abs().amax(-1, keepdim=True)
        return largest / self.grid.largest_code if self.steps == 1 else largest


class SignStage(LearnedScale):
    """alpha sign(w) of a weight [..., out, in], alpha trained, from mean |w| of its row; 0 stays 0.

    The value receives the gradient where |w| <= alpha, alpha that times sign(w), summed over its row and divided
    by the root of the matrix's number of weights.

    Args:
        weight: The weight it will be given: shape and device are taken.
        has_warmup: See `WarmedUp`.
    """

    technique: ClassVar[str] = "paretoq"

    def __init__(self, weight: Tensor, *, has_warmup: bool = False) -> None:
        super().__init__(weight, UniformGrid(1, "midrise"), Sharing("row"), has_warmup=has_warmup)
        self.grad_scale = matrix_grad_scale(weight, 1)

    def rounded(self, weight: Tensor) -> Tensor:
        return _ElasticSign.apply(weight, self.scale, self.grad_scale)  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes | None:
        if self.is_mixed or bool((weight == 0).any()):
            return None
        # By the sign itself: the grid rounds w / (2 alpha) - 1/2, where a tiny negative w is lost.
        scales = 2 * self.scale.detach().clamp(min=SMALLEST_SCALE)
        return Codes(values=(weight > 0).to(torch.uint8), encoding=1, scales=scales, zero=0.5)

    def learned_grid(self) -> LearnedGrid | None:
        return None  # gradients are others

    def start(self, weight: Tensor) -> Tensor:
        return weight.abs().mean(-1, keepdim=True)


def matrix_grad_scale(weight: Tensor, largest_code: int) -> float:
    """1 / sqrt(N Qp), N the weights of a matrix [out, in], each expert's of a stacked one."""
    return float((weight.shape[-2:].numel() * largest_code) ** -0.5)


class _ElasticSign(torch.autograd.Function):
    """Keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, grad_scale: float) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        ctx.grad_scale = grad_scale
        signs = torch.where(weight.isnan(), weight, weight.sign())  # torch has 0 for the sign of a NaN
        return (signs * alpha.clamp(min=SMALLEST_SCALE)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, alpha = ctx.saved_tensors
        passes = weight.abs() <= alpha.clamp(min=SMALLEST_SCALE)
        to_alpha = (grad * weight.sign()).to(alpha.dtype).sum(-1, keepdim=True) * ctx.grad_scale
        return torch.where(passes, grad, 0.0), to_alpha, None
