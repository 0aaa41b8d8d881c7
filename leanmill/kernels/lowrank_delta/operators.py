"""The operators behind `op.py`: W + s B A by blocks of rows, its gradients contracted block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.fake_quant.grid import make_grid
from leanmill.kernels.lowrank_delta import naive
from leanmill.kernels.lowrank_delta.merged import Gradients, Merged, Quantiser


def _merged(tensors: Sequence[Tensor | None], settings: Sequence[Any]) -> Merged:
    """From an operator's flat arguments."""
    weight, a, b, core, scale, offset = tensors
    scaling, num_bits, grid, straight_through, grad_scale, is_exact = settings
    assert weight is not None
    assert a is not None
    assert b is not None
    quantiser = None
    if scale is not None:
        quantiser = Quantiser(scale, offset, make_grid(num_bits, grid), straight_through, grad_scale)
    return Merged(weight, a, b, core, scaling, quantiser, is_exact=is_exact)


@torch.library.custom_op("leanmill::lowrank_delta", mutates_args=())
def merged_weight(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    scaling: float,
    num_bits: int,
    grid: str,
    straight_through: bool,
    grad_scale: float | None,
    is_exact: bool,
) -> Tensor:
    """Return what `op.lowrank_delta` does."""
    with naive.as_given(weight):
        merged = _merged(
            (weight, a, b, core, scale, offset), (scaling, num_bits, grid, straight_through, grad_scale, is_exact)
        )
    out = weight.new_empty(weight.shape)
    stack = out.view(merged.weight.shape)
    with naive.as_given(weight):
        for matrix, rows in merged.blocks():
            stack[matrix, rows] = merged.staged(merged.merged(matrix, rows), matrix, rows)
    return out


@merged_weight.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("leanmill::lowrank_delta_linear", mutates_args=())
def linear(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    x: Tensor,
    scaling: float,
    num_bits: int,
    grid: str,
    straight_through: bool,
    grad_scale: float | None,
    is_exact: bool,
) -> Tensor:
    """Return what `op.lowrank_delta_linear` does for flat tokens, without the bias."""
    with naive.as_given(weight):
        merged = _merged(
            (weight, a, b, core, scale, offset), (scaling, num_bits, grid, straight_through, grad_scale, is_exact)
        )
    out = None
    with naive.as_given(weight):
        for matrix, rows in merged.blocks():
            part = x @ merged.staged(merged.merged(matrix, rows), matrix, rows).to(x.dtype).T
            if part.shape[-1] == weight.shape[0]:
                return part
            out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
            out[:, rows] = part
    return x.new_empty(x.shape[0], 0) if out is None else out


@linear.register_fake
def _(
    weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None, scale: Tensor | None, offset: Tensor | None,
    x: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0])


_Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("leanmill::lowrank_delta_backward", mutates_args=())
def contract(
    grad: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    x: Tensor | None,
    scaling: float,
    num_bits: int,
    grid: str,
    straight_through: bool,
    grad_scale: float | None,
    is_exact: bool,
    needs_weight: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, a, b, core, scale, offset and x; empty ones for what there is not."""
    settings = (scaling, num_bits, grid, straight_through, grad_scale, is_exact)
    # Without a grid the values of the weight do not matter; the gradient stands in for its shape.
    with naive.as_given(grad):
        merged = _merged((grad if weight is None else weight, a, b, core, scale, offset), settings)
        found = merged.new_gradients(needs_weight)
        to_x = None
        if x is None:
            _contract_given(merged, found, grad)
        else:
            to_x = _contract_outer(merged, found, grad, x, needs_x)
        return _as_outputs(found, to_x, grad, weight, a, b, core, scale, offset)


def _contract_given(merged: Merged, found: Gradients, grad: Tensor) -> None:
    """From the gradient of the staged weight."""
    stack = grad.reshape(merged.weight.shape)
    for matrix, rows in merged.blocks():
        values = merged.merged(matrix, rows) if merged.quantiser is not None else grad
        merged.contract(found, stack[matrix, rows], values, matrix, rows)


def _contract_outer(merged: Merged, found: Gradients, grad: Tensor, x: Tensor, needs_x: bool) -> Tensor | None:
    """From the gradient of x W'^T, whose product with x is formed a block of rows at a time."""
    to_x = None
    for matrix, rows in merged.blocks():
        values = merged.merged(matrix, rows)
        part = grad[:, rows]
        if needs_x:
            to_x = _plus(to_x, part, merged.staged(values, matrix, rows).to(x.dtype))
        merged.contract(found, (part.T @ x).to(values.dtype), values, matrix, rows)
    return torch.zeros_like(x) if needs_x and to_x is None else to_x


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, summed over several blocks in fp32 at least."""
    if total is None:
        return left @ right
    exact = total.to(torch.promote_types(left.dtype, torch.float32))
    return exact.addmm_(left, right) if exact.dtype == left.dtype else exact.add_(left @ right)


def _as_outputs(
    found: Gradients,
    to_x: Tensor | None,
    grad: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
) -> _Found:
    left = found.left.view(b.shape[:-1] + a.shape[-2:-1])
    to_b, to_core = left, None
    if core is not None:
        to_b = left @ core.to(left.dtype).mT
        to_core = b.to(left.dtype).mT @ left

    def like(value: Tensor | None, target: Tensor | None) -> Tensor:
        # Outputs of an operator are neither None nor views of each other.
        if value is None or target is None:
            return a.new_empty(0)
        return value.reshape(target.shape).to(target.dtype)

    return (
        like(found.weight, grad if weight is None else weight),
        like(found.a, a),
        like(to_b, b),
        like(to_core, core),
        like(found.scale, scale),
        like(found.offset, offset),
        a.new_empty(0) if to_x is None else to_x.to(grad.dtype),
    )


@contract.register_fake
def _(
    grad: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    x: Tensor | None,
    *settings: Any,
) -> _Found:
    def like(target: Tensor | None) -> Tensor:
        if target is None:
            return a.new_empty(0)
        return torch.empty_like(target, memory_format=torch.contiguous_format)

    needs_weight, needs_x = settings[-2:]
    shape_of = grad if weight is None else weight
    return (
        like(shape_of if needs_weight else None), like(a), like(b), like(core), like(scale), like(offset),
        like(x if needs_x else None),
    )  # fmt: skip


def _save_for_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, a, b, core, scale, offset, *ctx.settings = inputs
    ctx.save_for_backward(None if scale is None else weight, a, b, core, scale, offset)


def _backward_of_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = contract(grad, *ctx.saved_tensors, None, *ctx.settings, ctx.needs_input_grad[0], False)
    return *_wanted(ctx, found[:6]), *[None] * 6


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.settings = *inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward_of_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = contract(grad.contiguous(), *ctx.saved_tensors, *ctx.settings, needs[0], needs[6])
    return *_wanted(ctx, found), *[None] * 6


def _wanted(ctx: Any, found: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if needed else None for tensor, needed in zip(found, ctx.needs_input_grad, strict=False)]


merged_weight.register_autograd(_backward_of_weight, setup_context=_save_for_weight)
linear.register_autograd(_backward_of_linear, setup_context=_save_for_linear)
