"""Shuffles of a range that no library version can change."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


Int64 = NDArray[np.int64]
TABLE_SIZE = 1 << 20
"""The longest range whose shuffle is held as a table (8 MiB); that of a longer one is computed entry by entry."""
_NUM_ROUNDS = 6
_MASK = (1 << 64) - 1


class Shuffle:
    """One shuffle of range(size), by index: a table where it is short, else a computed bijection.

    A Feistel network over the next even number of bits, whose results past the range are put through it again until
    they are inside (cycle walking; Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): at most four times
    on average. No memory, and no time before the first entry.

    Args:
        size: Entries, at least 1.
        seed: Any whole number.
        epoch: Which of a seed's shuffles.
        table_size: The longest that is held as a table.
    """

    def __init__(self, size: int, seed: int, epoch: int, *, table_size: int = TABLE_SIZE) -> None:
        self.size = size
        self._table = permutation(size, seed, epoch) if size <= table_size else None
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        base = _mixed((seed & _MASK) ^ _mixed(epoch + 1))
        self._keys = [_mixed(base ^ round_number) for round_number in range(1, _NUM_ROUNDS + 1)]

    def __getitem__(self, index: int) -> int:
        if self._table is not None:
            return int(self._table[index])
        value = self._once(index)
        while value >= self.size:
            value = self._once(value)
        return value

    def _once(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(key ^ right) & mask)
        return left << self._half | right


def permutation(size: int, seed: int, epoch: int) -> Int64:
    """Return a shuffle of range(size) as a table: sorted splitmix64 hashes."""
    keys = np.arange(size, dtype=np.uint64)
    with np.errstate(over="ignore"):
        keys = _splitmix64(keys ^ _splitmix64(np.uint64(seed % 2**64) ^ _splitmix64(np.uint64(epoch + 1))))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _splitmix64(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"; a bijection on 64 bits."""
    x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mixed(x: int) -> int:
    """`_splitmix64` of one number: numpy's scalars cost ten times as much."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
