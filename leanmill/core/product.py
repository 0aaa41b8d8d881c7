"""The matmuls of sites, with a weight of its own for the gradient of the input where a stage asks for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.grouped_gemm.op import grouped_gemm


def linear(tokens: Tensor, weight: Tensor, backward_weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return tokens @ weight^T + bias.

    Args:
        tokens: [..., in].
        weight: [out, in].
        backward_weight: [out, in] that multiplies the gradient of the output on its way to the tokens;
            None takes `weight`. The weight's own gradient is dY^T X either way.
        bias: [out] or None.
    """
    if backward_weight is None:
        # A sharding engine that computes in bf16 hands over what is staged in fp32.
        return F.linear(tokens, weight.to(compute_dtype(tokens)), bias)
    dtype = compute_dtype(tokens)
    tokens, weight, backward_weight = tokens.to(dtype), weight.to(dtype), backward_weight.to(dtype)
    product: Tensor = _OtherWeightBackward.apply(tokens, weight, backward_weight)
    return product if bias is None else product + bias.to(dtype)


def grouped(rows: Tensor, weight: Tensor, backward_weight: Tensor | None, offsets: Tensor, **routing: Any) -> Tensor:
    """Multiply rows sorted by expert with their expert's weight, in autocast's dtype where it is on.

    Args:
        rows: [N, in], sorted by expert, or tokens with a `gather_index`.
        weight: [E, out, in].
        backward_weight: As in `linear`, [E, out, in] or None.
        offsets: End row of each expert [E]; experts may have no rows.
        routing: `gather_index`, `scatter_index`, `scatter_weights` and `num_rows` of `grouped_gemm`.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
    rows, weight = rows.to(dtype), weight.to(dtype)
    if backward_weight is None:
        return grouped_gemm(rows, weight, offsets, **routing)
    # The first product hands its gradient to the weight and the combine weights, the second to the
    # rows alone; its value is taken off again.
    to_weight = grouped_gemm(rows.detach(), weight, offsets, **routing)
    constant: dict[str, Any] = {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in routing.items()
    }
    to_rows = grouped_gemm(rows, backward_weight.detach().to(dtype), offsets, **constant)
    return to_weight + (to_rows - to_rows.detach())


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a matmul of `tensor` runs in under autocast, or its own without."""
    if torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


class _OtherWeightBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, backward_weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, backward_weight)
        return F.linear(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, backward_weight = ctx.saved_tensors
        grad_tokens = grad.matmul(backward_weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.reshape(-1, grad.shape[-1]).t().matmul(tokens.reshape(-1, tokens.shape[-1]))
        return grad_tokens, grad_weight, None
