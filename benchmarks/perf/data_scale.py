"""What position and order cost as the data grows to 10^9 rows: the first row, a later one, and memory."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import conditions, write_result

from leanmill.data.packing import ShuffledRows, SplitPacker
from leanmill.data.sources import render_row


SEQUENCE_LENGTH, TOKENS_PER_DOCUMENT = 2048, 20_480


class Zeros:
    """As many tokens as there are, none of them anywhere."""

    def __getitem__(self, index: Any) -> Any:
        return np.zeros(index.shape, dtype=np.uint16)


def offsets(path: Path, num_documents: int) -> Any:
    """Boundaries of documents of one length, on disk as a cache has them."""
    found = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(num_documents + 1,))
    for first in range(0, num_documents + 1, 1 << 22):
        part = found[first : first + (1 << 22)]
        part[:] = np.arange(first, first + len(part), dtype=np.int64) * TOKENS_PER_DOCUMENT
    found.flush()
    del found
    return np.load(path, mmap_mode="r", allow_pickle=False)


def private_bytes() -> int:
    """Memory of this process that is its own: pages of a file that may be dropped do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(num_rows: int, folder: Path, num_reads: int) -> dict[str, float]:
    """First row, median of later ones anywhere in three epochs, and memory gained."""
    boundaries = offsets(folder / f"{num_rows}.npy", num_rows * SEQUENCE_LENGTH // TOKENS_PER_DOCUMENT)
    before, began = private_bytes(), time.perf_counter()
    rows = ShuffledRows(SplitPacker(boundaries, SEQUENCE_LENGTH, document_mask=True, seed=0), 0)
    render_row(rows.row(0), Zeros(), None, pad_id=0)  # type: ignore[arg-type]
    first = time.perf_counter() - began
    numbers = np.random.default_rng(0).integers(rows.rows_per_epoch, size=num_reads).tolist()
    seconds = []
    for number in numbers:
        began = time.perf_counter()
        render_row(rows.row(number), Zeros(), None, pad_id=0)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - began)
    (folder / f"{num_rows}.npy").unlink()
    return {
        "first_row_seconds": first,
        "row_seconds": statistics.median(seconds),
        "memory_mib": (private_bytes() - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", type=int, default=2000, help="rows read at each size")
    args = parser.parse_args()
    measured_under = conditions()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            f"{num_rows:.0e}": measure(num_rows, Path(folder), args.reads) for num_rows in (10**6, 10**7, 10**8, 10**9)
        }
    write_result("data_scale", {"sequence_length": SEQUENCE_LENGTH, "rows": found}, measured_under)


if __name__ == "__main__":
    main()
