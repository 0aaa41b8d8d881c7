"""Grids as objects: which levels there are, what rounding to them does to gradients, and their codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.core.facets import Codes
from leanmill.core.operands import lend
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, Gradient, Kind, make_grid
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.quant.codes import grid_codes


class Grid(Protocol):
    """Levels around zero, and what rounding to them does to gradients."""

    @property
    def largest_code(self) -> float:
        """What the grid reaches to at scale 1."""
        ...

    def rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return `values` [..., in] on the grid; scales are as `fake_quant` takes them."""
        ...

    def codes(self, weight: Tensor, scale: Tensor) -> Codes | None:
        """Return the integers of a weight [..., out, in], where levels are at equal distances."""
        ...


@dataclass(frozen=True)
class UniformGrid:
    """Levels at equal distances and the estimator of their gradient, as `fake_quant` has them."""

    num_bits: int
    """1 to 8."""
    kind: Kind = "signed"
    gradient: Gradient = "lsq"

    @property
    def largest_code(self) -> int:
        """Qp, at least 1."""
        return max(1, make_grid(self.num_bits, self.kind).high)

    def rounded(
        self, values: Tensor, scale: Tensor, offset: Tensor | None = None, *, grad_scale: float | None = None
    ) -> Tensor:
        """Return `values` [..., in] on the grid; scale, offset and `grad_scale` are as `fake_quant` takes them.

        On a grid without zero, values that are exactly 0 stay 0, so that a mask before it holds; they keep
        their gradient, and the scale gets none of them.
        """
        rounded = fake_quant(
            values, scale, offset, num_bits=self.num_bits, grid=self.kind, gradient=self.gradient, grad_scale=grad_scale
        )
        return _KeepZeros.apply(values, rounded) if self.kind == "midrise" else rounded  # type: ignore[no-any-return]

    def codes(self, weight: Tensor, scale: Tensor) -> Codes | None:
        """Return the integers of a weight [..., out, in] that `round` takes to the grid; None where it kept a zero."""
        if self.kind == "midrise" and bool((weight == 0).any()):
            return None
        return grid_codes(weight, scale, self.num_bits, self.kind)


@dataclass(frozen=True)
class NestedGrid:
    """Symmetric codes of `num_bits` that are rounded from symmetric codes of `store_bits`: one store, several widths.

    With s the scale of the store, q = clip(round(w / s)) and d = 2^(store_bits - num_bits), a value is
    clip(round(q / d)) d s (Double Rounding: Huang et al. 2025, arXiv:2502.01199); gradients pass unchanged.
    """

    store_bits: int
    num_bits: int
    """Up to `store_bits`."""

    @property
    def largest_code(self) -> int:
        """That of the store, whose scale it is."""
        return int(2 ** (self.store_bits - 1) - 1)

    @property
    def _distance(self) -> int:
        return int(2 ** (self.store_bits - self.num_bits))

    def rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return `values` [..., in] on the grid; scales are as `fake_quant` takes them."""
        with torch.no_grad():
            scales = scale.clamp(min=SMALLEST_SCALE).unsqueeze(-1)
            rounded = (self._units(values, scale) * (scales * self._distance)).flatten(-2).to(values.dtype)
        return lend(values, rounded)

    def codes(self, weight: Tensor, scale: Tensor) -> Codes:
        """Return the integers of a weight [..., out, in] in `num_bits`."""
        units = self._units(weight, scale).flatten(-2)
        codes = grid_codes(units, torch.ones_like(scale), self.num_bits, "symmetric")
        scales = scale.detach().float().clamp(min=SMALLEST_SCALE).reshape(codes.scales.shape)
        return replace(codes, scales=scales * self._distance)

    @torch.no_grad()
    def _units(self, values: Tensor, scale: Tensor) -> Tensor:
        scales = scale.clamp(min=SMALLEST_SCALE).unsqueeze(-1)
        groups = values.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
        stored = (groups / scales).round_().clamp_(-self.largest_code, self.largest_code)
        most = 2 ** (self.num_bits - 1) - 1
        return stored.div_(self._distance).round_().clamp_(-most, most)


class _KeepZeros(torch.autograd.Function):
    """`rounded`, and 0 where `values` are; only `values` are kept for backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return torch.where(values == 0, 0.0, rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (values,) = ctx.saved_tensors
        is_zero = values == 0
        return torch.where(is_zero, grad, 0.0), torch.where(is_zero, 0.0, grad)
