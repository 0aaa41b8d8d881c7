"""Fake quantisation and its gradients in plain tensor code: the definition.

With u = (v - offset) / scale - shift and q = clip(round(u), low, high), rounding halves to even,
the value becomes (q + shift) * scale + offset. Everything is computed in fp32 (fp64 for fp64) and
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, Grid


def forward(weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Return the fake-quantised weight in its own dtype; see `op.fake_quant`.

    Args:
        weight: Floating [..., in].
        scale: Of a shape that broadcasts against groups: [..., G] with `in` = G * g, or ones.
        offset: Like `scale`, or None.
        grid: Codes.
    """
    groups, scales, offsets = _grouped(weight, scale, offset)
    units = groups.sub(offsets).div_(scales) if offsets is not None else groups / scales
    codes = units.sub_(grid.shift).clamp_(grid.low, grid.high).round_().add_(grid.shift)
    out = codes.mul_(scales)
    return (out.add_(offsets) if offsets is not None else out).flatten(-2).to(weight.dtype)


def gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    grad_scale: float,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of weight, scale and offset for a gradient of the output.

    Inside of the grid's edges the value receives g, the scale g * (q + shift - u - shift) and the
    offset nothing; outside the value receives nothing, the scale g * (q + shift) and the offset g
    (LSQ, Esser et al. 2020; the offset is that of LSQ+, Bhalgat et al. 2020).
    """
    groups, scales, offsets = _grouped(weight, scale, offset)
    exact = grad.to(groups.dtype).unflatten(-1, groups.shape[-2:])
    units = (groups - offsets if offsets is not None else groups) / scales
    low, high = grid.edges
    is_inside = (units >= low) & (units <= high)
    codes = (units - grid.shift).clamp(grid.low, grid.high).round() + grid.shift
    to_scale = exact * torch.where(is_inside, codes - units, codes)
    to_offset = torch.where(is_inside, 0.0, exact)
    to_weight = grad.clone() if straight_through else torch.where(is_inside, exact, 0.0).flatten(-2).to(grad.dtype)
    scale_grad = _summed(to_scale, scale, grad_scale)
    return to_weight, scale_grad, None if offset is None else _summed(to_offset, offset, grad_scale)


def activations(tokens: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Return int8 codes [..., in] and steps [..., 1] of activations, per token; see `activations.py`."""
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if not tokens.numel():
        return exact.to(torch.int8), exact.new_full((*tokens.shape[:-1], 1), smallest / 127.0)
    largest = exact.abs().amax(-1, keepdim=True).clamp_(min=smallest)
    # A number divided by a tensor would be the tensor's reciprocal times the number, rounded twice.
    codes = exact.mul(torch.full_like(largest, 127.0).div_(largest)).round_().clamp_(-128, 127)
    # A NaN has no code; its step is NaN, and so is all that is made of it.
    return codes.nan_to_num_(0.0).to(torch.int8), largest / 127.0


def _grouped(weight: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight as [..., G, g] and scale and offset to match, in the type to compute in."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    num_groups = scale.shape[-1]
    groups = weight.to(exact, copy=True).unflatten(-1, (num_groups, weight.shape[-1] // num_groups))
    scales = scale.to(exact).clamp(min=SMALLEST_SCALE).unsqueeze(-1)
    return groups, scales, None if offset is None else offset.to(exact).unsqueeze(-1)


def _summed(terms: Tensor, like: Tensor, factor: float) -> Tensor:
    """Sum terms [..., G, g] over what shares an entry of `like` [..., G]."""
    sums = terms.sum(-1)
    shared = [dim for dim in range(like.dim()) if like.shape[dim] == 1 and sums.shape[dim] != 1]
    if shared:
        sums = sums.sum(shared, keepdim=True)
    return sums.mul(factor).to(like.dtype)
