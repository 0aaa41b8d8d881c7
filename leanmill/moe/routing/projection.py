"""Logits of a router in fp32, whatever its input and weight have been rounded to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Project(torch.autograd.Function):
    """x W^T in fp32 of operands kept for backward as they came; a plain product would keep fp32 copies."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad
        return (
            (gradient @ weight.float()).to(hidden.dtype) if of_hidden else None,
            (gradient.t() @ hidden.float()).to(weight.dtype) if of_weight else None,
        )


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return fp32 logits [T, E] of tokens [T, H] and a router's weight [E, H], also inside of autocast.

    bf16 logits lie 2^-8 apart: near ties are decided by their rounding, and combine weights are coarse. Inputs
    and weights are taken as they come (a sharding engine may have gathered weights in bf16), products and
    sums are fp32. Gradients have the dtypes of what they belong to.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits: Tensor = _Project.apply(hidden, weight)
        return logits if bias is None else logits + bias.float()
