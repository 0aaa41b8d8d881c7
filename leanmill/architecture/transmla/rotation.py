"""RoRoPE: keys of all heads, rotated into each other within each frequency.

A pair of numbers that RoPE rotates together is one complex number z, which it multiplies by exp(i m theta) at position
m. Unitary matrices over the heads of one frequency commute with that, so a model whose keys are rotated by U^H and
whose queries are rotated along computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def paired(rows: Tensor, head_dim: int) -> Tensor:
    """Return rows [heads x head_dim, n] as the complex rows that RoPE multiplies [heads, head_dim / 2, n]."""
    first, second = rows.view(-1, 2, head_dim // 2, rows.shape[-1]).unbind(1)
    return torch.complex(first, second)


def unpaired(pairs: Tensor) -> Tensor:
    """Return complex rows [heads, head_dim / 2, n] as real ones [heads x head_dim, n]."""
    return torch.cat([pairs.real, pairs.imag], dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Which parts of the keys stay rotary.

    Frequencies form groups of `fold` neighbours, which count as one. Of the heads x fold complex numbers of a group the
    leading principal components stay rotary, as many as frequencies the shared part has there.
    """

    components: Tensor
    """Of each group, complex128 [groups, heads x fold, kept]: orthonormal columns, that of the most energy first."""
    head_dim: int
    fold: int

    @property
    def rope_dim(self) -> int:
        """Numbers of the shared rotary part."""
        groups, _, kept = self.components.shape
        return 2 * groups * kept

    def shared_keys(self, keys: Tensor) -> Tensor:
        """Return the rotary part that all heads share [rope_dim, n] of keys [heads x head_dim, n]."""
        found = self.components.mH @ self._grouped(paired(keys, self.head_dim))
        return unpaired(found.flatten(0, 1)[None])

    def other_keys(self, keys: Tensor) -> Tensor:
        """Return what is left of keys [heads x head_dim, n], to be used without rotation."""
        grouped = self._grouped(paired(keys, self.head_dim))
        return unpaired(self._ungrouped(grouped - self.components @ (self.components.mH @ grouped)))

    def shared_queries(self, queries: Tensor) -> Tensor:
        """Return what meets `shared_keys` [query heads, rope_dim, n] of queries [query heads x head_dim, n].

        A query w of key-value head a meets sum_p U[a, p] z'_p, so it gives conj(U[a, p]) w to each component p.
        """
        pairs = paired(queries, self.head_dim)
        groups, rows, kept = self.components.shape
        heads = rows // self.fold
        per_head = self.components.view(groups, heads, self.fold, kept)
        own = pairs.view(heads, -1, groups, self.fold, pairs.shape[-1])
        found = torch.einsum("tafp,aqtfn->aqtpn", per_head.conj(), own).flatten(0, 1).flatten(1, 2)
        return torch.cat([found.real, found.imag], dim=1)

    def _grouped(self, pairs: Tensor) -> Tensor:
        """[heads, frequencies, n] to [groups, heads x fold, n]."""
        heads, _, width = pairs.shape
        return pairs.view(heads, -1, self.fold, width).transpose(0, 1).reshape(-1, heads * self.fold, width)

    def _ungrouped(self, grouped: Tensor) -> Tensor:
        groups, rows, width = grouped.shape
        heads = rows // self.fold
        return grouped.view(groups, heads, self.fold, width).transpose(0, 1).reshape(heads, -1, width)


def rotation_of(keys: Tensor, gram: Tensor, *, head_dim: int, fold: int, rope_dim: int) -> Rotation:
    """Return the rotation that leaves the most energy of keys in the rotary part.

    Args:
        keys: What makes keys of inputs [heads x head_dim, n] fp64.
        gram: Sum of x x^T over inputs [n, n] fp64.
        head_dim: Of a key.
        fold: Frequencies that count as one.
        rope_dim: Numbers of the rotary part; head_dim is a multiple of it, fold of head_dim / rope_dim.
    """
    kept = fold * rope_dim // head_dim
    heads = len(keys) // head_dim
    pairs = paired(keys, head_dim).view(heads, -1, fold, keys.shape[-1])
    grouped = pairs.transpose(0, 1).reshape(-1, heads * fold, keys.shape[-1])
    energy = grouped @ gram.to(grouped.dtype) @ grouped.mH
    return Rotation(
        components=torch.linalg.eigh(energy).eigenvectors.flip(-1)[..., :kept].contiguous(),
        head_dim=head_dim,
        fold=fold,
    )
