"""Ranks train what one process trains: some cells of the matrix. `make parity` runs all of them."""

from __future__ import annotations

import pytest
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

from tests.contract_training import save_teacher
from tests.distributed import run_ranks
from tests.parity.cells import LAYOUTS, Cell, all_cells, why_not
from tests.parity.running import Result, reference, run_cells


FAST = {
    ("ddp", "dp"): ("distill",),
    ("fsdp", "dp"): ("ternary", "branch"),
    ("ddp", "ep2"): ("2:4",),
    ("fsdp", "ep2"): ("dense",),
    ("fsdp", "tp2"): ("2:4",),
    ("ddp", "cp2"): ("2:4",),
    ("fsdp", "cp2 gathered"): ("branch",),
    ("ddp", "pp2 zbv"): ("2:4",),
    ("fsdp", "pp2"): ("ternary",),
    ("ddp", "cp2 by document"): ("ternary",),
}
"""In fp64, with accumulation, recomputation and packed rows."""


def _fast_cells() -> list[Cell]:
    hardest = {"accumulation": 3, "recompute": "full", "rows": "packed", "precision": "fp64"}
    return [
        cell
        for cell in all_cells((2,))
        if cell.technique in FAST.get((cell.engine, cell.layout), ())
        and all(getattr(cell, axis) == value for axis, value in hardest.items())
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def run_here(cells: list[Cell], teacher: str) -> list[Result]:
    for cell in cells:
        reference(cell, teacher)  # once, and by fork on all ranks
    return run_ranks(lambda: list(run_cells(cells, teacher)), cells[0].world_size, timeout_seconds=280)[0]


def test_two_ranks_equal_one_process_in_fp64(teacher: str) -> None:
    cells = _fast_cells()
    assert len(cells) == sum(map(len, FAST.values()))
    results = run_here(cells, teacher)
    assert [result.cell for result in results] == cells
    failed = [result.table() for result in results if result.failed or result.refused]
    assert not failed, "\n".join(failed)
    assert max(result.worst("gradient") for result in results) < 1e-12


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "hsdp"])
def test_other_engines_equal_one_process(engine: str, teacher: str) -> None:
    world_size = 4 if engine == "hsdp" else 2
    hardest = {"accumulation": 3, "recompute": "full", "rows": "packed", "precision": "fp32"}
    cells = [
        cell
        for cell in all_cells((world_size,))
        if cell.engine == engine
        and cell.layout in ("dp", "ep2")
        and all(getattr(cell, axis) == value for axis, value in hardest.items())
        and why_not(cell) is None
    ]
    failed = [result.table() for result in run_here(cells, teacher) if result.failed or result.refused]
    assert not failed, "\n".join(failed)


def test_every_engine_and_layout_has_cells() -> None:
    plainest = {"technique": "dense", "accumulation": 1, "recompute": "none", "rows": "whole", "precision": "fp32"}
    cells = [cell for cell in all_cells() if all(getattr(cell, axis) == value for axis, value in plainest.items())]
    refused = {cell.key: why for cell in cells if (why := why_not(cell)) is not None}
    legal = [cell for cell in cells if cell.key not in refused]
    assert {cell.layout for cell in legal} == set(LAYOUTS)
    assert {(cell.engine, cell.world_size) for cell in legal} >= {("single", 1), ("hsdp", 4), ("zero3", 2)}
    assert "DeepSpeed's flat partitions" in refused["2 zero2 experts sharded mixtral dense x1 none whole fp32"]
