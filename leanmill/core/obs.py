"""Optimal brain surgery on rows that share a Hessian: the recursion of SparseGPT and GPTQ.

Frantar and Alistarh 2022 and 2023 (arXiv:2208.11580, arXiv:2210.17323, arXiv:2301.00774). Columns are fixed
one after another; what a column loses is made up for by those after it, in the least-squares sense on
the calibration inputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


LAZY_COLUMNS = 128
"""Columns whose corrections are applied to the rest of the matrix at once. Results do not depend on it."""


class ColumnRule(Protocol):
    """Decides new values, a group of columns and then a column at a time."""

    def start_group(self, columns: Tensor, diagonal: Tensor) -> None:
        """See the columns [out, g] of a group as they are when it begins, and the factor's diagonal there [g]."""
        ...

    def value(self, column: Tensor, index: int) -> Tensor:
        """Return the new value of a column [out], given as it is now; `index` counts in its group."""
        ...


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor U [in, in] of the damped inverse Hessian, H^-1 = U^T U.

    Row j of U over its first entry says how the columns after j make up for an error in column j, all
    columns before it being fixed. A feature that was always 0 gets a Hessian of its own, so nothing
    makes up for it.

    Args:
        gram: Sum of x x^T [in, in]; not changed. Its scale does not matter.
        damping: Added to the diagonal, as a share of its mean.

    Raises:
        ValueError: The damped matrix is not positive definite; the message says what to type.
    """
    # In fp64: the inverse of an inverse loses twice the digits, and calibration is short of rank.
    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise ValueError(f"the calibration inputs are degenerate at damping {damping}; set damping: {10 * damping:g}")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(gram.dtype)


def solve_columns(weight: Tensor, factor: Tensor, rule: ColumnRule, *, group_size: int) -> Tensor:
    """Give every column of a weight the value that `rule` decides, the later ones making up for each error.

    Args:
        weight: [out, in] fp32; not changed.
        factor: U of `inverse_factor`.
        rule: Sees each column, and each group of columns as it begins, with all corrections so far.
        group_size: Columns of a group; the last may be shorter.

    Returns:
        [out, in] fp32.
    """
    weight, num_in = weight.clone(), weight.shape[1]
    num_lazy = -(-LAZY_COLUMNS // group_size) * group_size
    for first in range(0, num_in, num_lazy):
        last = min(first + num_lazy, num_in)
        block, rows = weight[:, first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for index in range(last - first):
            if index % group_size == 0:
                group = slice(index, index + group_size)
                rule.start_group(block[:, group], rows.diagonal()[group])
            column = block[:, index].clone()
            value = rule.value(column, index % group_size)
            errors[:, index] = (column - value) / rows[index, index]
            block[:, index + 1 :] -= errors[:, index : index + 1] * rows[index, index + 1 :]
            block[:, index] = value
        weight[:, last:] -= errors @ factor[first:last, last:]
    return weight
