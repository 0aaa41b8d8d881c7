"""What every path of the grouped product is given: operands, ends of groups, and who goes where."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def num_rows(self) -> int:
        """Rows in sorted order."""
        return self.rows.shape[0] if self.gather_index is None else self.gather_index.numel()

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
