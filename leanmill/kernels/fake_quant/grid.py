"""Uniform grids, the weights that share a scale, and the messages when something does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


Kind = Literal["signed", "symmetric", "unsigned", "midrise", "stretched"]
"""Codes of a grid of b bits: `signed` -2^(b-1) .. 2^(b-1) - 1, `symmetric` the same without the lowest,
`unsigned` 0 .. 2^b - 1, `midrise` the halves between -2^(b-1) and 2^(b-1), which leave out zero, `stretched` those
of `symmetric`, but values receive a gradient half a step past the outermost."""
Gradient = Literal["lsq", "straight_through"]
"""What the value receives: `lsq` nothing outside of the grid, `straight_through` everything."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALLEST_SCALE = 2.0**-40
"""A learned scale that falls below (or below zero) counts as this much, so that nothing divides by
zero and the scale can grow again. Ordinary weights have scales around 2^-7."""


@dataclass(frozen=True)
class Grid:
    """Codes `low` to `high`, each standing for (code + `shift`) times the scale."""

    low: int
    high: int
    shift: float = 0.0
    reach: float = 0.0
    """Steps past the outermost codes at which the value's gradient ends."""

    @property
    def edges(self) -> tuple[float, float]:
        """Values in units of the scale between which LSQ passes the value's gradient.

        The outermost codes, as in LSQ; with mid-rise and stretched grids half a step further, which is
        where both ParetoQ and QuEST (its trust region) put them.
        """
        return self.low + self.shift - self.reach, self.high + self.shift + self.reach


def make_grid(num_bits: int, kind: Kind) -> Grid:
    """Return the grid of `num_bits` bits.

    Raises:
        ValueError: Unknown kind, bits out of range, or a grid of a single sign.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"grid {kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
    if not isinstance(num_bits, int) or isinstance(num_bits, bool) or not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits={num_bits!r} is out of range; use a whole number from 1 to 8")
    if num_bits == 1 and kind in ("signed", "symmetric", "stretched"):
        raise ValueError(
            f"a {kind} grid of 1 bit has no positive code; use grid='midrise' for -s/2 and s/2, or "
            f"grid='unsigned' for 0 and s"
        )
    half = 1 << num_bits - 1
    grids = {
        "signed": Grid(-half, half - 1),
        "symmetric": Grid(1 - half, half - 1),
        "unsigned": Grid(0, 2 * half - 1),
        "midrise": Grid(-half, half - 1, shift=0.5, reach=0.5),
        "stretched": Grid(1 - half, half - 1, reach=0.5),
    }
    return grids[kind]


def scale_shape(weight: Tensor, scale: Tensor, name: str = "scale") -> tuple[int, ...]:
    """Return how a scale's shape divides a weight [..., out, in], as the shape that broadcasts.

    Args:
        weight: The weight, of any number of dims.
        scale: () or (1,) for the whole weight; [..., 1, 1] a matrix; [..., out, 1] a row;
            [..., out, in / g] a group of g neighbours along the last dim.
        name: What messages call the scale.

    Raises:
        ValueError: None of these.
    """
    shape, full = tuple(scale.shape), tuple(weight.shape)
    if shape in ((), (1,)) and shape != full:
        return (1,) * len(full)
    rows = shape[:-1] == full[:-1] and len(shape) > 0
    if rows and (shape[-1] == 1 or (shape[-1] > 0 and full[-1] % shape[-1] == 0)):
        return shape
    if len(full) >= 2 and shape == (*full[:-2], 1, 1):
        return shape
    raise ValueError(
        f"{name} {shape} does not divide a weight {full}; allowed: (1,) for the whole weight, "
        f"{(*full[:-2], 1, 1) if len(full) >= 2 else (1,)} a matrix, {(*full[:-1], 1)} a row, "
        f"(..., groups) a group, where groups divides {full[-1] if full else 0}"
    )


def check_float(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless `tensor` is of a type the kernels know."""
    if tensor.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{name} {tuple(tensor.shape)} has dtype {tensor.dtype}; allowed: {allowed}")


def default_grad_scale(weight: Tensor, num_scales: int, grid: Grid) -> float:
    """LSQ's 1 / sqrt(N Qp), N the weights that share a scale and Qp the largest code, at least 1."""
    sharing = weight.numel() // max(1, num_scales)
    return 1.0 / (max(1, sharing) * max(1, grid.high)) ** 0.5
