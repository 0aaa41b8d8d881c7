"""Weights on a uniform grid as the integers they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.core.facets import Codes
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, Kind, make_grid, scale_shape
from leanmill.kernels.packing.encoding import Encoding


@torch.no_grad()
def grid_codes(weight: Tensor, scale: Tensor, num_bits: int, kind: Kind) -> Codes:
    """Return the codes of `fake_quant(weight, scale)`: (values - zero) * scales is that weight.

    Args:
        weight: Floating [..., out, in].
        scale: As `fake_quant` takes it.
        num_bits: 1 to 8; stored in the next of 1, 2, 4, 8, or in base 3 where a grid's codes are -1, 0, 1.
        kind: See `fake_quant`.
    """
    grid = make_grid(num_bits, kind)
    scales = scale.detach().float().clamp(min=SMALLEST_SCALE).reshape(scale_shape(weight, scale))
    groups = weight.float().unflatten(-1, (scales.shape[-1], -1))
    units = (groups / scales.unsqueeze(-1) - grid.shift).clamp(grid.low, grid.high).round()
    if (grid.low, grid.high, grid.shift) == (-1, 1, 0):
        return Codes(values=units.to(torch.int8).flatten(-2), encoding="ternary", scales=scales, zero=0.0)
    # Distances from the lowest code, which is the zeroth.
    values = (units - grid.low).to(torch.uint8).flatten(-2)
    return Codes(values=values, encoding=_encoding(num_bits), scales=scales, zero=-grid.low - grid.shift)


def _encoding(num_bits: int) -> Encoding:
    fitting: tuple[Encoding, ...] = (1, 2, 4, 8)
    return next(bits for bits in fitting if isinstance(bits, int) and num_bits <= bits)
