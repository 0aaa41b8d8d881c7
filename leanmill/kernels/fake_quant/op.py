"""Fake quantisation of weights with learned step sizes."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from leanmill.kernels.fake_quant import dispatch, naive
from leanmill.kernels.fake_quant.grid import (
    Gradient,
    Grid,
    Kind,
    check_float,
    default_grad_scale,
    make_grid,
    scale_shape,
)
from leanmill.kernels.sharded import is_dtensor


def fake_quant(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    num_bits: int,
    grid: Kind = "signed",
    gradient: Gradient = "lsq",
    grad_scale: float | None = None,
) -> Tensor:
    """Round a weight to a uniform grid whose scale (and offset) can be learned.

    (clip(round((w - offset) / scale - shift), low, high) + shift) * scale + offset, halves to even,
    shift 1/2 for `midrise` and 0 otherwise, computed in fp32 (fp64 for fp64) and rounded once. With g the
    gradient of the output, the weight receives g inside of the grid and 0 outside, the scale the
    sum of g * (round(u) - u) inside and g times the outermost code outside, with u = (w - offset) /
    scale, the offset the sum of g outside; the last two times `grad_scale`. LSQ (Esser et al. 2020,
    arXiv:1902.08153), LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576); the mid-rise grid
    of ParetoQ (Liu et al. 2025, arXiv:2502.02631) and QuEST (Panferov et al. 2025,
    arXiv:2502.05003), whose value gradient ends half a step past the outermost codes (ParetoQ: 0.99
    of that). Scales below 2^-40 count as 2^-40.

    Args:
        weight: fp32, bf16, fp16 or fp64 [..., out, in]; a DTensor if `scale` is one too.
        scale: Floating; its shape says what shares one: (1,) the whole weight, [..., 1, 1] a
            matrix, [..., out, 1] a row, [..., out, in / g] a group of g neighbours.
        offset: Floating, of the scale's shape, or None.
        num_bits: 1 to 8.
        grid: `signed` (-2^(b-1) to 2^(b-1) - 1), `symmetric` (without the lowest), `unsigned`
            (0 to 2^b - 1), `midrise` (the halves between -2^(b-1) and 2^(b-1)) or `stretched` (as `symmetric`,
            the value's gradient ending half a step past the outermost codes; ParetoQ's ternary is that of 2 bits).
        gradient: `lsq`, or `straight_through`: the weight receives g everywhere.
        grad_scale: Factor of the gradients of scale and offset. None is LSQ's 1 / sqrt(N Qp), N the
            weights that share a scale and Qp the largest code. (The paper has one scale a layer;
            ParetoQ keeps the layer's N with one scale a row: pass that to reproduce it.)

    Returns:
        The fake-quantised weight, of the weight's shape and dtype.

    Raises:
        ValueError: Shapes, dtypes, devices, bits or names that do not fit.
    """
    return _run(weight, scale, offset, num_bits, grid, gradient, grad_scale)


def initial_scale(weight: Tensor, scale_like: tuple[int, ...], *, num_bits: int, grid: Kind = "signed") -> Tensor:
    """LSQ's starting point, 2 mean |w| / sqrt(Qp) over what shares a scale.

    Args:
        weight: Floating [..., out, in].
        scale_like: Shape of the scale, one of those `fake_quant` takes.
        num_bits: 1 to 8.
        grid: As in `fake_quant`.

    Returns:
        fp32 of shape `scale_like` (fp64 for fp64).
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    largest_code = max(1, make_grid(num_bits, grid).high)
    shape = scale_shape(weight, weight.new_empty(scale_like, device="meta"))
    magnitude = weight.detach().to(exact).abs().unflatten(-1, (shape[-1], weight.shape[-1] // shape[-1])).mean(-1)
    shared = [d for d in range(len(shape)) if shape[d] == 1 and magnitude.shape[d] != 1]
    means = magnitude.mean(shared, keepdim=True) if shared else magnitude
    return means.mul(2.0 / largest_code**0.5).reshape(scale_like)


def _run(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    num_bits: int,
    grid: Kind,
    gradient: Gradient,
    grad_scale: float | None,
) -> Tensor:
    make_grid(num_bits, grid)
    shape = _checked(weight, scale, offset, gradient)
    scale, offset = scale.reshape(shape), None if offset is None else offset.reshape(shape)
    settings = (num_bits, grid, gradient == "straight_through", grad_scale)
    if not is_dtensor(weight):
        return _fake_quant(weight, scale, offset, *settings)
    if not _splits_alike(weight, scale, offset):
        return _TensorCode.apply(weight, scale, offset, *settings)
    return _on_shards(weight, scale, offset, settings)


def _checked(weight: Tensor, scale: Tensor, offset: Tensor | None, gradient: str) -> tuple[int, ...]:
    if weight.dim() == 0:
        raise ValueError("the weight has no dims; use a weight [..., in]")
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient {gradient!r} is unknown; use one of {', '.join(get_args(Gradient))}")
    check_float(weight, "the weight")
    check_float(scale, "scale")
    if offset is not None:
        check_float(offset, "offset")
        if offset.shape != scale.shape:
            raise ValueError(f"offset {tuple(offset.shape)} must have the scale's shape {tuple(scale.shape)}")
    for name, other in (("scale", scale), ("offset", offset)):
        if other is not None and is_dtensor(other) != is_dtensor(weight):
            raise ValueError(
                f"{name} {tuple(other.shape)} and the weight {tuple(weight.shape)} must both be DTensors or both "
                f"plain; distribute {name} over the weight's mesh first"
            )
    dispatch.same_device(weight, scale=scale, offset=offset)
    return scale_shape(weight, scale)


_Settings = tuple[int, str, bool, float | None]


@torch.library.custom_op("leanmill::fake_quant", mutates_args=())
def _fake_quant(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    num_bits: int,
    grid: str,
    straight_through: bool,
    grad_scale: float | None,
) -> Tensor:
    return dispatch.forward(weight, scale, offset, make_grid(num_bits, grid))  # type: ignore[arg-type]


@_fake_quant.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("leanmill::fake_quant_backward", mutates_args=())
def _fake_quant_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    num_bits: int,
    grid: str,
    straight_through: bool,
    grad_scale: float | None,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    codes = make_grid(num_bits, grid)  # type: ignore[arg-type]
    factor = default_grad_scale(weight, scale.numel(), codes) if grad_scale is None else grad_scale
    to_weight, to_scale, to_offset = dispatch.gradients(
        grad, weight, scale, offset, codes, factor, straight_through, needs_weight
    )
    # An operator's outputs cannot be None: an empty tensor stands for each that is not needed.
    return (
        weight.new_empty(0) if to_weight is None else to_weight,
        to_scale,
        scale.new_empty(0) if to_offset is None else to_offset,
    )


@_fake_quant_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(weight, memory_format=contiguous) if settings[-1] else weight.new_empty(0),
        torch.empty_like(scale, memory_format=contiguous),
        scale.new_empty(0) if offset is None else torch.empty_like(offset, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, offset, *settings = inputs
    # Inputs only: the codes are recomputed, so nothing weight-sized is kept beyond the weight.
    ctx.save_for_backward(weight, scale, offset)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, offset = ctx.saved_tensors
    straight_through = ctx.settings[2]
    wants = ctx.needs_input_grad[:3]
    if straight_through and not any(wants[1:]):
        return grad, *[None] * 6
    found = _fake_quant_backward(grad, weight, scale, offset, *ctx.settings, wants[0])
    return *(tensor if want else None for tensor, want in zip(found, wants, strict=True)), *[None] * 4


_fake_quant.register_autograd(_backward, setup_context=_setup_context)


class _TensorCode(torch.autograd.Function):
    """The same on DTensors of any placement: statistics and sums are those of the whole tensors."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor | None, *settings: Any) -> Tensor:
        num_bits, grid, *_ = settings
        ctx.save_for_backward(weight, scale, offset)
        ctx.settings = settings
        return naive.forward(weight, scale, offset, make_grid(num_bits, grid))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, scale, offset = ctx.saved_tensors
        num_bits, grid, straight_through, grad_scale = ctx.settings
        codes: Grid = make_grid(num_bits, grid)
        factor = default_grad_scale(weight, scale.numel(), codes) if grad_scale is None else grad_scale
        found = naive.gradients(grad, weight, scale, offset, codes, factor, straight_through)
        return *found, *[None] * 4


def _splits_alike(weight: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether every rank holds whole rows together with exactly the scales of those rows."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(weight, DTensor)
    for other in (scale, offset):
        if isinstance(other, DTensor) and other.placements != weight.placements:
            return False
    last = weight.dim() - 1
    return not any(p.is_partial() for p in weight.placements) and all(
        p.dim % weight.dim() < last and scale.shape[p.dim] == weight.shape[p.dim]
        for p in weight.placements
        if isinstance(p, Shard)
    )


def _on_shards(weight: Any, scale: Any, offset: Any, settings: _Settings) -> Tensor:
    from torch.distributed.tensor import DTensor

    parts = [None if tensor is None else tensor.to_local() for tensor in (weight, scale, offset)]
    local = _fake_quant(*parts, *settings)
    stride = torch.empty(weight.shape, device="meta").stride()
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=stride
    )
