"""The merged weight a block of rows at a time: made, rounded to a grid, and differentiated.

A block's merged weight and the gradient of that block exist only while the block is worked on, so
neither a merged weight for backward nor a weight-sized gradient is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from leanmill.kernels.fake_quant import dispatch
from leanmill.kernels.fake_quant.grid import Grid, default_grad_scale
from leanmill.kernels.lowrank_delta.naive import compute_dtype


_BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**23}
"""Smaller blocks hold less, but their matmuls lose more to starting and stopping than a cache gains."""


@dataclass(frozen=True)
class Quantiser:
    """Fake quantisation after the merge; `scale` and `offset` in the shape that broadcasts."""

    scale: Tensor
    offset: Tensor | None
    grid: Grid
    straight_through: bool
    grad_scale: float | None


@dataclass
class Gradients:
    """What a backward pass collects; None for what nobody needs."""

    weight: Tensor | None
    a: Tensor
    left: Tensor
    """Of b @ core (of b without a core)."""
    scale: Tensor | None
    offset: Tensor | None


class Merged:
    """W + s B A as blocks of rows, W [..., out, in] with any leading dims flattened to one.

    The sum is rounded to W's dtype, unless `is_exact`.
    """

    def __init__(
        self,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        scaling: float,
        quantiser: Quantiser | None,
        *,
        is_exact: bool,
    ) -> None:
        self.weight = _stacked(weight)
        self.dtype = compute_dtype(weight, a, b, core)
        self.merged_dtype = self.dtype if is_exact else weight.dtype
        left = b.to(self.dtype) if core is None else b.to(self.dtype) @ core.to(self.dtype)
        self.a, self.left, self.scaling = _stacked(a.to(self.dtype)), _stacked(left), scaling
        self.quantiser = quantiser
        # Sums over blocks of a scale in half precision would lose what single blocks add.
        exact = torch.promote_types(self.merged_dtype, torch.float32)
        self.scale = None if quantiser is None else _stacked(quantiser.scale.to(exact))
        self.offset = None if quantiser is None or quantiser.offset is None else _stacked(quantiser.offset.to(exact))
        self.factor = 1.0
        if quantiser is not None:
            given = quantiser.grad_scale
            count = quantiser.scale.numel()
            self.factor = default_grad_scale(weight, count, quantiser.grid) if given is None else given

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Matrix and rows of every block."""
        num_matrices, num_rows, width = self.weight.shape
        budget = _BLOCK_ELEMENTS.get(self.weight.device.type, 2**21)
        step = max(1, budget // max(1, width))
        for matrix in range(num_matrices):
            for first in range(0, num_rows, step):
                yield matrix, slice(first, min(first + step, num_rows))

    def merged(self, matrix: int, rows: slice) -> Tensor:
        """The merged rows, before the grid."""
        base = self.weight[matrix, rows].to(self.dtype)
        product = torch.addmm(base, self.left[matrix, rows], self.a[matrix], alpha=self.scaling)
        return product.to(self.merged_dtype)

    def staged(self, merged: Tensor, matrix: int, rows: slice) -> Tensor:
        """The merged rows after the grid."""
        if self.quantiser is None:
            return merged
        scale, offset = _rows_of(self.scale, matrix, rows), _rows_of(self.offset, matrix, rows)
        assert scale is not None
        return dispatch.forward(merged, scale, offset, self.quantiser.grid, in_threads=False)

    def new_gradients(self, needs_weight: bool) -> Gradients:
        """Zeros for what blocks add to, and room for what they write."""
        return Gradients(
            weight=torch.empty_like(self.weight) if needs_weight else None,
            a=torch.zeros_like(self.a, dtype=torch.promote_types(self.dtype, torch.float32)),
            left=torch.zeros_like(self.left),
            scale=None if self.scale is None else torch.zeros_like(self.scale),
            offset=None if self.offset is None else torch.zeros_like(self.offset),
        )

    def contract(self, found: Gradients, grad: Tensor, merged: Tensor, matrix: int, rows: slice) -> None:
        """Add a block's share: from the gradient of its staged rows to that of the factors and scales."""
        if self.quantiser is not None:
            grad = self._through_grid(found, grad, merged, matrix, rows)
        if found.weight is not None:
            found.weight[matrix, rows] = grad
        exact = grad.to(self.dtype)
        found.a[matrix] += (self.left[matrix, rows].mT @ exact).mul_(self.scaling)
        found.left[matrix, rows] = (exact @ self.a[matrix].mT).mul_(self.scaling)

    def _through_grid(self, found: Gradients, grad: Tensor, merged: Tensor, matrix: int, rows: slice) -> Tensor:
        assert self.quantiser is not None
        scale, offset = _rows_of(self.scale, matrix, rows), _rows_of(self.offset, matrix, rows)
        assert scale is not None
        to_merged, to_scale, to_offset = dispatch.gradients(
            grad,
            merged,
            scale,
            offset,
            self.quantiser.grid,
            self.factor,
            self.quantiser.straight_through,
            in_threads=False,
        )
        for total, part in ((found.scale, to_scale), (found.offset, to_offset)):
            share = _rows_of(total, matrix, rows)
            if share is not None and part is not None:
                share += part
        assert to_merged is not None
        return to_merged


def _stacked(tensor: Tensor) -> Tensor:
    """As [matrices, rows, columns]."""
    return tensor.reshape(tensor.shape[:-2].numel(), *tensor.shape[-2:])


def _rows_of(values: Tensor | None, matrix: int, rows: slice) -> Tensor | None:
    """The entries of [matrices or 1, rows or 1, groups] that rows of a matrix use, as a view."""
    if values is None:
        return None
    own = values[matrix if values.shape[0] > 1 else 0]
    return own[rows] if own.shape[0] > 1 else own
