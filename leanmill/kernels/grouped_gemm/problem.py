"""What every path of the grouped product is given: operands, ends of groups, and who goes where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Checked operands of one product; rows of the product are in sorted order, N of them."""

    rows: Tensor
    """[N, in], or [T, in] where `gather_index` is given; contiguous."""
    weight: Tensor
    """[E, out, in], contiguous, in the dtype of `rows`."""
    offsets: Tensor
    """[E] int64: end row of each expert."""
    gather_index: Tensor | None = None
    """[T, K] int64: sorted rows that read each token."""
    scatter_index: Tensor | None = None
    """[T, K] int64: sorted rows that are summed to each token."""
    scatter_weights: Tensor | None = None
    """[T, K]: their factors."""
    num_kept: int | None = None
    """Rows in sorted order that exist, where entries of an index from there on have none."""

    @property
    def num_rows(self) -> int:
        """Rows in sorted order."""
        if self.gather_index is None:
            return self.rows.shape[0]
        return self.gather_index.numel() if self.num_kept is None else self.num_kept

    def by_copy(self, by_row: Tensor) -> Tensor:
        """Values of sorted rows [N] as those of the copies of `scatter_index` [T, K]; zero for copies without a row."""
        assert self.scatter_index is not None
        if self.num_rows < self.scatter_index.numel():
            by_row = torch.cat([by_row, by_row.new_zeros(self.scatter_index.numel() - self.num_rows)])
        return by_row[self.scatter_index]

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """Columns of the rows."""
        return self.weight.shape[2]


@dataclass(frozen=True)
class Gradients:
    """What backward has to return; None where it was not asked for."""

    rows: Tensor | None = None
    weight: Tensor | None = None
    scatter_weights: Tensor | None = None


@dataclass(frozen=True)
class Needed:
    """Which gradients backward has to return."""

    rows: bool = True
    weight: bool = True
    scatter_weights: bool = False
