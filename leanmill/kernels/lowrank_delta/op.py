"""W + s B A, alone, rounded to a grid, or as a whole linear layer, with gradients that stay low-rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.fake_quant.dispatch import same_device
from leanmill.kernels.fake_quant.grid import Gradient, Kind, check_float, make_grid, scale_shape
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.kernels.lowrank_delta import naive
from leanmill.kernels.lowrank_delta.blocks import Gradients, Merged, Quantiser
from leanmill.kernels.sharded import is_dtensor


def lowrank_delta(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    core: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    num_bits: int = 4,
    grid: Kind = "signed",
    gradient: Gradient = "lsq",
    grad_scale: float | None = None,
) -> Tensor:
    """Return W + s B A (W + s B N A with a core), optionally rounded to a learned grid.

    LoRA (Hu et al. 2021, arXiv:2106.09685); with a core LoRA-XS and its kin; with `scale` L4Q (Jeon et al. 2024,
    arXiv:2402.04902): fake_quant(W + s B A). The backward pass works through blocks of rows: it
    merges a block again, takes its gradient through the grid and contracts that to the factors at
    once: with G the gradient of the merged weight, dA = s (B N)^T G, dB = s G A^T N^T,
    dN = s B^T G A^T. Kept for it are the inputs, without a grid only the factors. The weight
    receives G if it requires a gradient; a frozen one costs nothing.

    Args:
        weight: fp32, bf16, fp16 or fp64 [..., out, in].
        a: Floating [..., rank, in].
        b: Floating [..., out, rank].
        scaling: s.
        core: Floating [..., rank of b, rank of a], or None.
        scale: Step sizes of the grid, shaped as for `fake_quant`; None for no grid.
        offset: Of the scale's shape, or None.
        num_bits: Of the grid, 1 to 8.
        grid: As in `fake_quant`.
        gradient: As in `fake_quant`.
        grad_scale: As in `fake_quant`.

    Returns:
        Of the weight's shape and dtype. The sum is computed in the widest dtype given and rounded
        to the weight's before it meets the grid.

    Raises:
        ValueError: Shapes, dtypes, devices, bits or names that do not fit.
    """
    _check(weight, a, b, core)
    scale, offset = _check_quantiser(weight, scale, offset, num_bits, grid, gradient)
    if is_dtensor(weight):
        # Tensor code knows every placement; factors of a sharded weight are not sharded alike.
        merged = naive.lowrank_delta(weight, a, b, scaling, core)
        options: dict[str, Any] = {"num_bits": num_bits, "grid": grid, "gradient": gradient, "grad_scale": grad_scale}
        return merged if scale is None else fake_quant(merged, scale, offset, **options)
    settings = (scaling, num_bits, grid, gradient == "straight_through", grad_scale)
    return _lowrank_delta(weight, a, b, core, scale, offset, *settings)


def lowrank_delta_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    core: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    num_bits: int = 4,
    grid: Kind = "signed",
    gradient: Gradient = "lsq",
    grad_scale: float | None = None,
) -> Tensor:
    """Return x W'^T + bias with W' = `lowrank_delta` of the other arguments, never holding W' or its gradient.

    Forward and backward merge a block of rows, use it and drop it: of dY^T x only the rows of one
    block exist at a time, contracted to the factors before the next. Memory beyond inputs and
    outputs is a few blocks, and with half precision one fp32 copy of x's gradient, in which blocks
    are summed.

    Args:
        x: Floating [..., in]; the staged rows are converted to its dtype.
        weight: fp32, bf16, fp16 or fp64 [out, in].
        a: As in `lowrank_delta`, and so are those that follow.
        b: [out, rank].
        scaling: s.
        core: [rank of b, rank of a], or None.
        bias: [out], or None.
        scale: Step sizes of the grid; None for no grid.
        offset: Of the scale's shape, or None.
        num_bits: Of the grid, 1 to 8.
        grid: As in `fake_quant`.
        gradient: As in `fake_quant`.
        grad_scale: As in `fake_quant`.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes, devices, bits or names that do not fit.
    """
    _check(weight, a, b, core)
    scale, offset = _check_quantiser(weight, scale, offset, num_bits, grid, gradient)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and a weight {tuple(weight.shape)} do not multiply; use [..., in], [out, in]"
        )
    check_float(x, "x")
    same_device(weight, x=x, bias=bias)
    if is_dtensor(weight):
        options: dict[str, Any] = {"num_bits": num_bits, "grid": grid, "gradient": gradient, "grad_scale": grad_scale}
        staged = lowrank_delta(weight, a, b, scaling, core, scale=scale, offset=offset, **options)
        return F.linear(x, staged.to(x.dtype), bias)
    settings = (scaling, num_bits, grid, gradient == "straight_through", grad_scale)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = _lowrank_delta_linear(weight, a, b, core, scale, offset, rows, *settings)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _check(weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None) -> None:
    for name, tensor in (("the weight", weight), ("a", a), ("b", b), ("core", core)):
        if tensor is not None:
            check_float(tensor, name)
    ranks = (b.shape[-1:], a.shape[-2:-1]) if a.dim() > 1 and b.dim() else ((), (0,))
    fits = weight.dim() >= 2 and a.shape == (*weight.shape[:-2], *ranks[1], weight.shape[-1])
    fits = fits and b.shape == (*weight.shape[:-1], *ranks[0])
    if core is None:
        fits = fits and ranks[0] == ranks[1]
    else:
        fits = fits and core.shape == (*weight.shape[:-2], *ranks[0], *ranks[1])
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(t.shape)}" for name, t in (("a", a), ("b", b), ("core", core)) if t is not None
        )
        raise ValueError(
            f"{shapes} do not multiply to a weight {tuple(weight.shape)}; use a [..., rank, in], "
            f"b [..., out, rank], core [..., rank of b, rank of a] or None, weight [..., out, in]"
        )
    same_device(weight, a=a, b=b, core=core)


def _check_quantiser(
    weight: Tensor, scale: Tensor | None, offset: Tensor | None, num_bits: int, grid: Kind, gradient: Gradient
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and offset in the shape that broadcasts."""
    if scale is None:
        if offset is not None:
            raise ValueError("offset without scale; pass both, or neither for no grid")
        return None, None
    make_grid(num_bits, grid)
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient {gradient!r} is unknown; use one of {', '.join(get_args(Gradient))}")
    check_float(scale, "scale")
    same_device(weight, scale=scale, offset=offset)
    shape = scale_shape(weight, scale)
    if offset is None:
        return scale.reshape(shape), None
    check_float(offset, "offset")
    if offset.shape != scale.shape:
        raise ValueError(f"offset {tuple(offset.shape)} must have the scale's shape {tuple(scale.shape)}")
    return scale.reshape(shape), offset.reshape(shape)


def _merged(tensors: Sequence[Tensor | None], settings: Sequence[Any]) -> Merged:
    """From an operator's flat arguments."""
    weight, a, b, core, scale, offset = tensors
    scaling, num_bits, grid, straight_through, grad_scale = settings
    assert weight is not None
    assert a is not None
    assert b is not None
    quantiser = None
    if scale is not None:
        quantiser = Quantiser(scale, offset, make_grid(num_bits, grid), straight_through, grad_scale)
    return Merged(weight, a, b, core, scaling, quantiser)


@torch.library.custom_op("leanmill::lowrank_delta", mutates_args=())
def _lowrank_delta(
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
) -> Tensor:
    with naive.as_given(weight):
        merged = _merged((weight, a, b, core, scale, offset), (scaling, num_bits, grid, straight_through, grad_scale))
    out = weight.new_empty(weight.shape)
    stack = out.view(merged.weight.shape)
    with naive.as_given(weight):
        for matrix, rows in merged.blocks():
            stack[matrix, rows] = merged.staged(merged.merged(matrix, rows), matrix, rows)
    return out


@_lowrank_delta.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("leanmill::lowrank_delta_linear", mutates_args=())
def _lowrank_delta_linear(
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
) -> Tensor:
    with naive.as_given(weight):
        merged = _merged((weight, a, b, core, scale, offset), (scaling, num_bits, grid, straight_through, grad_scale))
    out = None
    with naive.as_given(weight):
        for matrix, rows in merged.blocks():
            part = x @ merged.staged(merged.merged(matrix, rows), matrix, rows).to(x.dtype).T
            if part.shape[-1] == weight.shape[0]:
                return part
            out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
            out[:, rows] = part
    return x.new_empty(x.shape[0], 0) if out is None else out


@_lowrank_delta_linear.register_fake
def _(
    weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None, scale: Tensor | None, offset: Tensor | None,
    x: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0])


_Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("leanmill::lowrank_delta_backward", mutates_args=())
def _contract(
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
    needs_weight: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, a, b, core, scale, offset and x; empty ones for what there is not."""
    settings = (scaling, num_bits, grid, straight_through, grad_scale)
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


@_contract.register_fake
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
    found = _contract(grad, *ctx.saved_tensors, None, *ctx.settings, ctx.needs_input_grad[0], False)
    return *_wanted(ctx, found[:6]), *[None] * 5


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.settings = *inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward_of_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = _contract(grad.contiguous(), *ctx.saved_tensors, *ctx.settings, needs[0], needs[6])
    return *_wanted(ctx, found), *[None] * 5


def _wanted(ctx: Any, found: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if needed else None for tensor, needed in zip(found, ctx.needs_input_grad, strict=False)]


_lowrank_delta.register_autograd(_backward_of_weight, setup_context=_save_for_weight)
_lowrank_delta_linear.register_autograd(_backward_of_linear, setup_context=_save_for_linear)
