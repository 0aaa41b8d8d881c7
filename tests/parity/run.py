"""`make parity`: every cell of the matrix at 1, 2 and 4 ranks, and the page that says how they went.

Results are kept in `runs/parity` by what the code was, so that a run that was cut off goes on where it was; a cell
that fails or takes its ranks down is noted, and the others are run all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

from tests.contract_training import save_teacher
from tests.distributed import run_ranks
from tests.parity.cells import Cell, all_cells, why_not
from tests.parity.page import write_page
from tests.parity.running import Result, reference, run_cells


ROOT = Path(__file__).parents[2]
CELLS_AT_ONCE = 24
"""In one process group: starting ranks costs as much as a few cells."""
_SECONDS_A_CELL = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, write the page and return 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--share", type=float, default=1.0, help="run this share of the cells, drawn evenly")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "results" / "parity.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "parity")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    legal, refused = [], {}
    for cell in all_cells(tuple(args.ranks)):
        why = why_not(cell)
        if why is None:
            legal.append(cell)
        else:
            refused[cell] = why
    chosen = sorted(legal, key=_draw)[: max(1, round(args.share * len(legal)))]
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / f"{_code()}.jsonl"
    known = _read(log)
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_teacher(Path(folder))
        left = [cell for cell in chosen if cell.key not in known]
        print(f"{len(left)} of {len(chosen)} cells to run; results go to {log}", flush=True)
        for line in _run(left, teacher, log):
            known[line["key"]] = line
            _say(line, len(known))
    done = [known[cell.key] | {"cell": cell} for cell in chosen]
    write_page(args.page, done, refused, num_legal=len(legal))
    print(f"wrote {args.page}")
    return int(any(one["failed"] for one in done))


def _draw(cell: Cell) -> str:
    """Where a cell comes in an order that has nothing to do with what it is."""
    return hashlib.sha256(cell.key.encode()).hexdigest()


def _code() -> str:
    """Digest of the code that results are of."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "leanmill").rglob("*.py"), *(ROOT / "tests" / "parity").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _read(log: Path) -> dict[str, dict[str, Any]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def _run(cells: list[Cell], teacher: str, log: Path) -> Iterator[dict[str, Any]]:
    def group_of(cell: Cell) -> tuple[int, str]:
        return cell.world_size, cell.engine

    for (world_size, _), members in groupby(sorted(cells, key=group_of), key=group_of):
        rest = list(members)
        while rest:
            waiting, rest = rest[:CELLS_AT_ONCE], rest[CELLS_AT_ONCE:]
            while waiting:
                for cell in waiting:
                    reference(cell, teacher)
                before = _read(log)
                crash = _run_group(waiting, world_size, teacher, log)
                waiting = [cell for cell in waiting if cell.key not in _read(log)]
                if crash and waiting:  # the first one without a result took the ranks down
                    _append(log, _line(Result(waiting.pop(0), [], [], 0.0), crash=crash))
                yield from (line for key, line in _read(log).items() if key not in before)


def _run_group(cells: list[Cell], world_size: int, teacher: str, log: Path) -> str:
    """Run cells, noting each as it ends; return what took the ranks down, if something did."""

    def body() -> None:
        for result in run_cells(cells, teacher):
            _append(log, _line(result))

    try:
        if world_size == 1:
            body()
        else:
            run_ranks(body, world_size, timeout_seconds=_SECONDS_A_CELL * len(cells))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return ""


def _append(log: Path, line: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _line(result: Result, crash: str = "") -> dict[str, Any]:
    failed = [dataclasses.asdict(one) for one in result.failed]
    if crash:
        failed = [{"quantity": "crash", "family": "", "step": 0, "error": 1.0, "ratio": 0.0, "reason": crash}]
    worst = {name: result.worst(name) for name in ("loss", "gradient", "norm", "weight")} if result.every else {}
    return {
        "key": result.cell.key,
        "seconds": round(result.seconds, 2),
        "worst": worst,
        "failed": failed,
        "refused": result.refused,
    }


def _say(line: dict[str, Any], number: int) -> None:
    told = "refused" if line["refused"] else "FAILED" if line["failed"] else "equal"
    print(f"{number:5} {line['key']:70} {told} ({line['seconds']:.1f} s)", flush=True)
    for one in line["failed"]:
        print(
            f"      step {one['step'] + 1} {one['quantity']} {one['family']}: ratio {one['ratio']:.6g}, {one['reason']}"
        )


if __name__ == "__main__":
    sys.exit(main())
