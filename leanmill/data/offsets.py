"""Where each document of a prepared domain begins, in a file that runs map: no memory, however many there are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


OFFSETS = "offsets.npy"


def write_offsets(folder: Path, lengths: Sequence[Path]) -> None:
    """Write the boundaries of the documents of all shards, [D + 1] from 0, whole or not at all.

    Args:
        folder: Of the domain.
        lengths: A file of each shard, with the tokens of its documents.
    """
    shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in lengths]
    temporary = folder / f"{OFFSETS}.part"
    shape = (1 + sum(map(len, shards)),)
    offsets = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=shape)
    first = 0
    for shard in shards:
        np.cumsum(shard, out=offsets[first + 1 : first + 1 + len(shard)])
        offsets[first + 1 : first + 1 + len(shard)] += offsets[first]
        first += len(shard)
    offsets.flush()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / OFFSETS)


def read_offsets(folder: Path, lengths: Sequence[Path]) -> NDArray[np.int64]:
    """Return them, mapped; of a folder from before they were written, made of the lengths in memory.

    Their last must be the number of tokens that shards have, which a file that was cut does not come to.
    """
    if (folder / OFFSETS).is_file():
        try:
            found: NDArray[np.int64] = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):  # cut: it ends nowhere
            return np.zeros(1, dtype=np.int64)
        return found
    shards = [np.load(path, allow_pickle=False) for path in lengths]
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(shards), dtype=np.int64)])
