"""Running cells of the parity matrix: many in one process group, each beside one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.parallel.launch import Ranks
from leanmill.trainer.parity.compare import Difference, compare
from leanmill.trainer.parity.trace import Trace, trace
from tests.parity.cells import BOUNDS, LAYOUTS, Cell, recipe_of, sizes_of


def traced(cell: Cell, teacher: str) -> Trace:
    """Train a cell on the ranks that are here."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    dtype = torch.float64 if cell.precision == "fp64" else torch.float32
    return trace(recipe_of(cell, teacher), ranks, dtype=dtype, packed=cell.rows == "packed")


@dataclass(frozen=True)
class Result:
    """One cell beside one process."""

    cell: Cell
    every: list[Difference]
    failed: list[Difference]
    seconds: float
    refused: str = ""
    """What the package says where it does not train such a cell."""

    def worst(self, quantity: str) -> float:
        """The largest relative difference of a quantity over its families."""
        return max(one.error for one in self.every if one.quantity == quantity)

    def table(self) -> str:
        """What failed, a line a family."""
        lines = [
            f"  step {one.step + 1} {one.quantity:9}{one.family:16}off by {one.error:.1e}, "
            f"ratio {one.ratio:.6g}: {one.reason}"
            for one in self.failed
        ]
        return "\n".join([self.cell.key, *lines])


@cache
def reference(cell: Cell, teacher: str) -> Trace:
    """Train what a cell must equal; made in the process that starts ranks, and shared with them."""
    return traced(cell.reference, teacher)


def judged(cell: Cell, teacher: str, found: list[Trace]) -> tuple[list[Difference], list[Difference]]:
    """Hold the ranks of a cell beside its reference; see `leanmill.trainer.parity.compare.compare`."""
    found = _whole(found, LAYOUTS[cell.layout].get("pp", 1))
    return compare(reference(cell, teacher), found, bounds=BOUNDS[cell.precision], sizes=sizes_of(cell))


def _whole(found: list[Trace], pp: int) -> list[Trace]:
    """Complete what each rank of a pipeline has by what the other stages have."""
    if pp == 1:
        return found
    apart = len(found) // pp

    def complete(rank: int, values: Callable[[Trace], dict[str, Tensor]]) -> dict[str, Tensor]:
        stages = [*found[rank % apart :: apart], found[rank]]  # its own last, so that they count
        return {name: value for trace in stages for name, value in values(trace).items()}

    return [
        replace(
            trace,
            start=complete(rank, lambda one: one.start),
            weights=complete(rank, lambda one: one.weights),
            gradients=[
                complete(rank, lambda one, step=step: one.gradients[step])  # type: ignore[misc]
                for step in range(len(trace.gradients))
            ],
        )
        for rank, trace in enumerate(found)
    ]


def run_cells(cells: Sequence[Cell], teacher: str) -> Iterator[Result]:
    """Train cells of one number of ranks one after the other, on the ranks of a group or alone.

    Args:
        cells: The cells; their references are made.
        teacher: See `recipe_of`.

    Yields:
        Results, on rank 0.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for cell in cells:
        started = time.perf_counter()
        try:
            mine = traced(cell, teacher)
        except ConfigError as refusal:  # of all ranks alike, before any of them waits for another
            if is_first:
                yield Result(cell, [], [], time.perf_counter() - started, str(refusal))
            continue
        everyone: list[Any] | None = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size() if is_first else None
            dist.gather_object(mine, everyone)
        if everyone is not None:
            every, failed = judged(cell, teacher, everyone)
            yield Result(cell, every, failed, time.perf_counter() - started)
