"""Two binaries as a stage."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanmill.core.facets import PartStaging
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import QuantStage


TRIED = tuple(0.5 + 0.05 * index for index in range(41))
"""Multiples of the mean magnitude that training may start from as s."""


class DualStage(QuantStage):
    """Snap a weight [..., out, in] to alpha1 b1 + alpha2 b2, b1 and b2 in {0, 1} and both alphas trained.

    b1 = H(w - (alpha1 + alpha2) / 2) and b2 = H(alpha1 b1 + alpha2 / 2 - w), H the step that is 1 from 0 on: with the
    alphas of the start, 2s and -s, the nearest of -s, 0, s and 2s. The value's gradient passes unchanged; an alpha
    receives that of the weights whose binary is 1, over the root of the number of weights that share it (as LSQ's,
    where the paper, whose code is not public, says nothing). Exact zeros stay 0 and give the alphas nothing.

    Args:
        weight: The weight it will be given: shape and device are taken.
        sharing: What shares a pair of alphas.
        has_warmup: See `WarmedUp`.
    """

    technique: ClassVar[str] = "dual_binary"

    def __init__(self, weight: Tensor, sharing: Sharing, *, has_warmup: bool = False) -> None:
        super().__init__(sharing, has_warmup=has_warmup, device=weight.device)
        shape = sharing.scale_shape(weight.shape)
        # As many weights share each, whatever part of them is here.
        self.grad_scale = float((weight.numel() / torch.Size(shape).numel()) ** -0.5)
        self.alpha1 = nn.Parameter(torch.full(shape, 2.0, dtype=torch.float32, device=weight.device))
        self.alpha2 = nn.Parameter(torch.full(shape, -1.0, dtype=torch.float32, device=weight.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.alpha1.fill_(2.0)
        self.alpha2.fill_(-1.0)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        exact = weight.float()
        count = self.sharing.total((exact != 0).float()).clamp(min=1)
        mean = self.sharing.total(exact.abs()) / count
        best, least = mean, torch.full_like(mean, torch.inf)
        for multiple in TRIED:
            scale = mean * multiple
            rounded = _snapped(exact, *(self.sharing.spread(a, exact.shape[-1]) for a in (2 * scale, -scale)))[0]
            error = self.sharing.total((rounded - exact).square())
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        self.alpha1.copy_(2 * best)
        self.alpha2.copy_(-best)

    def rounded(self, weight: Tensor) -> Tensor:
        return _Dual.apply(weight, self.alpha1, self.alpha2, self.sharing, self.grad_scale)  # type: ignore[no-any-return]

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self.rounded(part)
        yield

    def extra_repr(self) -> str:
        return f"{self.sharing}, scales=2 x {tuple(self.alpha1.shape)}"


def _snapped(exact: Tensor, alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the levels, and where b1 and b2 are 1; alphas broadcast against the weight."""
    is_kept = exact != 0
    first = (exact >= (alpha1 + alpha2) / 2) & is_kept
    second = (exact <= alpha1 * first + alpha2 / 2) & is_kept
    levels = alpha1 * first + alpha2 * second
    return torch.where(exact.isnan(), exact, levels), first, second


def _of(weight: Tensor, alpha1: Tensor, alpha2: Tensor, sharing: Sharing) -> tuple[Tensor, Tensor, Tensor]:
    exact = weight.to(alpha1.dtype) if weight.dtype != torch.float64 else weight
    return _snapped(exact, *(sharing.spread(alpha, weight.shape[-1]) for alpha in (alpha1, alpha2)))


class _Dual(torch.autograd.Function):
    """Keeps its inputs only."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, alpha1: Tensor, alpha2: Tensor, sharing: Sharing, grad_scale: float
    ) -> Tensor:
        ctx.save_for_backward(weight, alpha1, alpha2)
        ctx.sharing, ctx.grad_scale = sharing, grad_scale
        return _of(weight, alpha1, alpha2, sharing)[0].to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        weight, alpha1, alpha2 = ctx.saved_tensors
        _, first, second = _of(weight, alpha1, alpha2, ctx.sharing)
        to_alphas = [ctx.sharing.total(grad.to(alpha1.dtype) * binary) * ctx.grad_scale for binary in (first, second)]
        return grad, to_alphas[0], to_alphas[1], None, None
