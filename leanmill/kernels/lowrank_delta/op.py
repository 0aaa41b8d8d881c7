"""W + s B A, alone, rounded to a grid, or as a whole linear layer, with gradients that stay low-rank."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.fake_quant.dispatch import same_device
from leanmill.kernels.fake_quant.grid import Gradient, Kind, check_float, make_grid, scale_shape
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.kernels.lowrank_delta import naive
from leanmill.kernels.lowrank_delta.operators import linear, merged_weight
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
    settings = (scaling, num_bits, grid, gradient == "straight_through", grad_scale, False)
    return merged_weight(weight, a, b, core, scale, offset, *settings)


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
    is_exact: bool = False,
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
        is_exact: Keep the sum in the widest dtype given, in which it meets the grid, instead of rounding it to the
            weight's: for frozen weights that are stored in bf16 and merged in fp32.

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
        whole = weight.float() if is_exact else weight
        staged = lowrank_delta(whole, a, b, scaling, core, scale=scale, offset=offset, **options)
        return F.linear(x, staged.to(x.dtype), bias)
    settings = (scaling, num_bits, grid, gradient == "straight_through", grad_scale, is_exact)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = linear(weight, a, b, core, scale, offset, rows, *settings)
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
