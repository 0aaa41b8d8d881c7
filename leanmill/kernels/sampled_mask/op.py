"""A weight times a mask drawn softly from logits, differentiable, where there is C code for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose
from leanmill.kernels.sampled_mask import cpu
from leanmill.kernels.sampled_mask.draw import Draw


def covers(weight: Tensor, logits: Tensor, draw: Draw) -> bool:
    """Whether `drawn` computes this; who asks has tensor code for the rest."""
    return choose("sampled_mask", weight, logits, c=lambda: cpu.covers(weight, logits, draw), triton=_none) is Code.C


def drawn(weight: Tensor, logits: Tensor, draw: Draw, pull: Tensor) -> Tensor:
    """Return `weight` times the mask sum_k y_k S_k, y the shares that `draw` describes and S_k the ways to keep N of M.

    The gradient of the mask is that of this and of -pull * ||weight * mask||^2, in which the weight counts as a
    constant. Backward draws again, so weight and logits are all that is kept.

    Args:
        weight: fp32, bf16 or fp16 [..., in] on the CPU, where `covers` says so.
        logits: fp32 [..., in / M, C], or any shape of as many in that order.
        draw: Pattern, noise, scale and temperature.
        pull: (1,). Backward reads it as it then is and sets it to 0, so that of all backward passes the first
            adds the second part.

    Returns:
        [..., in] in the weight's dtype, rounded once.
    """
    return _Drawn.apply(weight, logits, draw, pull)  # type: ignore[no-any-return]


def _none() -> bool:
    """No Triton kernel: there tensor code runs, which compiles into one."""
    return False


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, draw: Draw, pull: Tensor) -> Tensor:
        ctx.save_for_backward(weight, logits)
        ctx.draw, ctx.pull = draw, pull
        return cpu.forward(weight.contiguous(), logits.contiguous(), draw)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        weight, logits = ctx.saved_tensors
        to_weight, to_logits = cpu.backward(
            weight.contiguous(),
            logits.contiguous(),
            grad.contiguous(),
            ctx.draw,
            float(ctx.pull),
            wants_weight=ctx.needs_input_grad[0],
        )
        if not ctx.needs_input_grad[1]:
            return to_weight, None, None, None
        ctx.pull.zero_()
        return to_weight, to_logits, None, None
