"""Gram matrices in tiles: half the memory and half the work of whole ones, and given up tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


TILE = 512
"""Rows and columns of a tile."""


class Gram:
    """A symmetric matrix [n, n], kept as the tiles on and above its diagonal.

    Args:
        size: n.
        dtype: Of the tiles, which lie on the CPU.
    """

    def __init__(self, size: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.dtype = size, dtype
        self.parts = parts_of(size)
        self.tiles: dict[tuple[int, int], Tensor] = {
            (i, j): torch.zeros(_length(self.parts[i]), _length(self.parts[j]), dtype=dtype)
            for i in range(len(self.parts))
            for j in range(i, len(self.parts))
        }
        """By row and column of tiles; those on the diagonal are whole."""

    @classmethod
    def of(cls, matrix: Tensor) -> Gram:
        """Return a symmetric matrix [n, n] in tiles."""
        gram = cls(len(matrix), dtype=matrix.dtype)
        for (i, j), tile in gram.tiles.items():
            tile.copy_(matrix[gram.parts[i], gram.parts[j]])
        return gram

    def add(self, rows: Tensor) -> None:
        """Add x x^T of every row x of `rows` [N, n]."""
        for (i, j), tile in self.tiles.items():
            left, right = rows[:, self.parts[i]].t(), rows[:, self.parts[j]]
            if rows.device == tile.device:
                tile.addmm_(left, right)
            else:
                tile += (left @ right).to(tile.device)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace every tile by `total` of it, such as its sum over ranks."""
        for key, tile in self.tiles.items():
            self.tiles[key] = total(tile)

    def diagonal(self) -> Tensor:
        """Return the diagonal [n]."""
        return torch.cat([self.tiles[i, i].diagonal() for i in range(len(self.parts))])

    def whole(self) -> Tensor:
        """Return the matrix [n, n]."""
        return self._rows(torch.arange(self.size))

    def energy(self, weight: Tensor) -> float:
        """Return the trace of W G W^T for `weight` [out, n]: ||W X||^2 where this is the gram matrix of X."""
        found = 0.0
        for (i, j), tile in self.tiles.items():
            part = ((weight[:, self.parts[i]] @ tile) * weight[:, self.parts[j]]).sum(dtype=torch.float64)
            found += float(part) * (1 if i == j else 2)
        return found

    def permuted(self, order: Tensor) -> Gram:
        """Return the matrix with rows and columns in another order [n]."""
        found = Gram(self.size, dtype=self.dtype)
        for i, part in enumerate(found.parts):
            rows = self._rows(order[part])
            for j in range(i, len(found.parts)):
                found.tiles[i, j] = rows[:, order[found.parts[j]]]
        return found

    def _rows(self, index: Tensor) -> Tensor:
        """The rows of the whole matrix with these numbers."""
        rows = torch.empty(len(index), self.size, dtype=self.dtype)
        for (i, j), tile in self.tiles.items():
            for source, part, other in ((tile, i, j), (tile.t(), j, i)):
                first, last = self.parts[part].start, self.parts[part].stop
                here = (index >= first) & (index < last)
                rows[here, self.parts[other]] = source[index[here] - first]
        return rows


def parts_of(size: int) -> list[slice]:
    """Return the rows of each row of tiles."""
    return [slice(start, min(start + TILE, size)) for start in range(0, size, TILE)]


def _length(part: slice) -> int:
    return int(part.stop - part.start)
