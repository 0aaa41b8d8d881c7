"""Optimal brain surgery on rows that share a Hessian: the recursion of SparseGPT and GPTQ.

Frantar and Alistarh 2022 and 2023 (arXiv:2208.11580, arXiv:2210.17323, arXiv:2301.00774). Columns are fixed
one after another; what a column loses is made up for by those after it, in the least-squares sense on
the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leanmill.core.gram import Gram


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


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U [n, n] of a damped inverse Hessian, H^-1 = U^T U, in tiles.

    Row j of U over its first entry says how the columns after j make up for an error in column j, all
    columns before it being fixed.
    """

    parts: list[slice]
    tiles: dict[tuple[int, int], Tensor]
    """On and above the diagonal, fp64."""
    ridge: Tensor
    """What was added to the diagonal of the Hessian [n], fp64."""

    def diagonal(self, dtype: torch.dtype) -> Tensor:
        """Return the diagonal [n]."""
        return torch.cat([self.tiles[i, i].diagonal() for i in range(len(self.parts))]).to(dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return U[first:last, first:]."""
        size = self.parts[-1].stop
        found = torch.zeros(last - first, size - first, dtype=dtype)
        for (i, j), tile in self.tiles.items():
            rows, columns = self.parts[i], self.parts[j]
            top, bottom, left = max(rows.start, first), min(rows.stop, last), max(columns.start, first)
            if top < bottom and left < columns.stop:
                part = tile[top - rows.start : bottom - rows.start, left - columns.start :]
                found[top - first : bottom - first, left - first : columns.stop - first] = part
        return found


def inverse_factor(gram: Gram, damping: float) -> Factor:
    """Return the factor of the Hessian `gram` + ridge. A feature that was always 0 gets a Hessian of its own.

    With H = R R^T for an upper R, U is R^-1: one inverse, where the inverse of H and its factor would be two.

    Args:
        gram: Sum of x x^T [n, n]; its tiles are used up. Its scale does not matter.
        damping: Added to the diagonal, as a share of its mean.

    Raises:
        ValueError: The damped matrix is not positive definite; the message says what to type.
    """
    diagonal = gram.diagonal().double()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    ridge = torch.where(diagonal == 0, (1 + damping) * mean, damping * mean)
    # In fp64, because calibration is short of rank.
    tiles = {key: gram.tiles.pop(key).double() for key in list(gram.tiles)}
    for number, part in enumerate(gram.parts):
        tiles[number, number].diagonal().add_(ridge[part])
    if not _factorise_(tiles, len(gram.parts)):
        raise ValueError(f"the calibration inputs are degenerate at damping {damping}; set damping: {10 * damping:g}")
    _invert_(tiles, len(gram.parts))
    return Factor(gram.parts, tiles, ridge)


def _factorise_(tiles: dict[tuple[int, int], Tensor], num_tiles: int) -> bool:
    """Overwrite H by its upper factor R, H = R R^T, from the last column on; whether H is positive definite."""
    for k in reversed(range(num_tiles)):
        factor, failed = torch.linalg.cholesky_ex(tiles[k, k].flip(0, 1))
        if int(failed):
            return False
        tiles[k, k] = factor.flip(0, 1)
        for i in range(k):
            tiles[i, k] = torch.linalg.solve_triangular(tiles[k, k].t(), tiles[i, k], upper=False, left=False)
        for j in range(k):
            for i in range(j + 1):
                tiles[i, j].addmm_(tiles[i, k], tiles[j, k].t(), alpha=-1)
    return True


def _invert_(tiles: dict[tuple[int, int], Tensor], num_tiles: int) -> None:
    """Overwrite an upper R by its inverse, a column after the other."""
    for j in range(num_tiles):
        identity = torch.eye(len(tiles[j, j]), dtype=tiles[j, j].dtype)
        tiles[j, j] = torch.linalg.solve_triangular(tiles[j, j], identity, upper=True)
        for i in range(j):
            # Rows above are inverted, those from i on are still R's.
            product = tiles[i, i] @ tiles[i, j]
            for k in range(i + 1, j):
                product.addmm_(tiles[i, k], tiles[k, j])
            tiles[i, j] = product.neg_() @ tiles[j, j]


def solve_columns(weight: Tensor, factor: Factor, rule: ColumnRule, *, group_size: int) -> tuple[Tensor, float]:
    """Give every column of a weight the value that `rule` decides, the later ones making up for each error.

    Args:
        weight: [out, n] fp32; not changed.
        factor: Of `inverse_factor`.
        rule: Sees each column, and each group of columns as it begins, with all corrections so far.
        group_size: Columns of a group; the last may be shorter.

    Returns:
        The new weight W' [out, n] fp32, and ||(W' - W) X||^2 on the inputs X of the gram matrix.
    """
    before, weight, num_in = weight, weight.clone(), weight.shape[1]
    damped_error = 0.0
    diagonal = factor.diagonal(weight.dtype)
    for first, last in _spans(num_in, group_size):
        block, rows = weight[:, first:last], factor.rows(first, last, weight.dtype)
        errors = torch.empty_like(block)
        for index in range(last - first):
            place = (first + index) % group_size
            if place == 0:
                group = slice(first + index, first + index + group_size)
                rule.start_group(weight[:, group], diagonal[group])
            column = block[:, index].clone()
            value = rule.value(column, place)
            errors[:, index] = (column - value) / rows[index, index]
            block[:, index + 1 :] -= errors[:, index : index + 1] * rows[index, index + 1 : last - first]
            block[:, index] = value
        weight[:, last:].addmm_(errors, rows[:, last - first :], alpha=-1)
        damped_error += float(errors.square().sum(dtype=torch.float64))
    # W - W' is E U, and U H U^T the identity: the squares of E sum up to the error under H.
    return weight, max(0.0, damped_error - _ridge_error(before, weight, factor.ridge))


def _spans(num_in: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Yield the columns whose corrections wait for each other: whole groups, or parts of one that is larger."""
    num_lazy = -(-LAZY_COLUMNS // group_size) * group_size
    for first in range(0, num_in, num_lazy):
        last = min(first + num_lazy, num_in)
        step = last - first if group_size <= LAZY_COLUMNS else LAZY_COLUMNS
        for start in range(first, last, step):
            yield start, min(start + step, last)


def _ridge_error(before: Tensor, after: Tensor, ridge: Tensor) -> float:
    """The part of the error that is the ridge's."""
    rows = zip(before.split(32), after.split(32), strict=True)
    return float(sum(((new - old).double().square().sum(0) @ ridge for old, new in rows), torch.zeros(())))
