"""Inverses of the Fisher matrix among neighbouring weights, from a few gradients (M-FAC: Frantar et al., 2107.03356).

F = (ridge I + sum over gradients g of g g^T) / m of m gradients is never formed: by Woodbury's identity its inverse is
that of an m x m matrix, beside a diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from leanmill.core.views import View


class Inverse:
    """ridge (ridge I + G^T G)^-1 of some matrices G, by Woodbury's identity: I - G^T (ridge I + G G^T)^-1 G.

    Args:
        gradients: G [matrices, rows, n], fp64.
        ridge: Above 0.
    """

    def __init__(self, gradients: Tensor, ridge: float) -> None:
        self.gradients = gradients
        kernel = gradients @ gradients.mT
        kernel.diagonal(dim1=-2, dim2=-1).add_(ridge)
        self.solved = torch.cholesky_solve(gradients, torch.linalg.cholesky(kernel))

    def diagonal(self) -> Tensor:
        """Return the diagonals [matrices, n], above 0."""
        return (1 - (self.gradients * self.solved).sum(1)).clamp_(min=torch.finfo(torch.float64).eps)

    def times(self, vectors: Tensor) -> Tensor:
        """Return the products with vectors [matrices, n]."""
        return vectors - (self.solved.mT @ (self.gradients @ vectors.unsqueeze(-1))).squeeze(-1)


class SharedInverse:
    """The same of every block of a weight of which this rank holds a piece; pieces may cut blocks.

    Only what is m wide is summed over ranks: for each block m x m numbers, and m for each product. fp64.

    Args:
        weight: The piece, of a weight [..., out, in].
        gradients: m of the whole weight's gradients, like the piece.
        left: Which weights are among those looked at, bool like the piece; the curvature is theirs alone.
        block_size: Neighbours in a row that are looked at together; the last ones of a row may be fewer.
        damping: The ridge, as a share of the mean of sum g^2 over the weight.
    """

    def __init__(
        self, weight: View, gradients: Sequence[Tensor], left: Tensor, *, block_size: int, damping: float
    ) -> None:
        self.weight = weight
        self.gradients = [(gradient * left).flatten() for gradient in gradients]
        num_in = weight.piece.shape[-1]
        a_row = -(-num_in // block_size)
        index = weight.index().flatten()
        self.numbers = index // num_in * a_row + index % num_in // block_size
        """Of the block of each element of the piece."""
        self.num_blocks = weight.numel // num_in * a_row
        energy = sum((g.double().square().sum() for g in self.gradients), torch.zeros((), dtype=torch.float64))
        mean = float(weight.reduce(energy.to(weight.value.device), "sum")) / weight.numel
        self.ridge = max(damping * mean, torch.finfo(torch.float32).tiny)

    @cached_property
    def small(self) -> Tensor:
        """(ridge I + G G^T)^-1 of each block, [blocks, m, m]. A collective when first asked for."""
        m = len(self.gradients)
        kernel = torch.zeros(m, m, self.num_blocks, dtype=torch.float64, device=self.numbers.device)
        for (i, left), (j, right) in self._pairs():
            kernel[i, j].index_add_(0, self.numbers, left.double() * right)
            kernel[j, i] = kernel[i, j]
        kernel = self.weight.reduce(kernel, "sum").permute(2, 0, 1).contiguous()
        kernel.diagonal(dim1=-2, dim2=-1).add_(self.ridge)
        return torch.cholesky_inverse(torch.linalg.cholesky(kernel))

    def diagonal(self) -> Tensor:
        """Return the diagonal of ridge (ridge I + G^T G)^-1, above 0, like the piece. A collective."""
        small = self.small
        found = torch.ones(self.numbers.shape, dtype=torch.float64, device=self.numbers.device)
        for (i, left), (j, right) in self._pairs():
            found -= (1 if i == j else 2) * small[:, i, j][self.numbers] * left * right
        return found.clamp_(min=torch.finfo(torch.float64).eps).view(self.weight.value.shape)

    def times(self, vector: Tensor) -> Tensor:
        """Return the product of ridge (ridge I + G^T G)^-1 with a vector like the piece, fp64. A collective."""
        flat = vector.flatten().double()
        sums = torch.zeros(len(self.gradients), self.num_blocks, dtype=torch.float64, device=flat.device)
        for row, gradient in zip(sums, self.gradients, strict=True):
            row.index_add_(0, self.numbers, gradient * flat)
        solved = (self.small @ self.weight.reduce(sums, "sum").t().unsqueeze(-1)).squeeze(-1)
        for number, gradient in enumerate(self.gradients):
            flat = flat - solved[:, number][self.numbers] * gradient
        return flat.view(vector.shape)

    def _pairs(self) -> Iterator[tuple[tuple[int, Tensor], tuple[int, Tensor]]]:
        for i, left in enumerate(self.gradients):
            for j, right in enumerate(self.gradients[: i + 1]):
                yield (i, left), (j, right)
