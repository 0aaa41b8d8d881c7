"""The page of the parity matrix: what was run, where, and how far apart ranks and one process are."""

from __future__ import annotations

import datetime
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.parity.cells import BOUNDS, LAYOUTS, TECHNIQUES, Cell


def write_page(path: Path, done: Sequence[Mapping[str, Any]], refused: Mapping[Cell, str], *, num_legal: int) -> None:
    """Write the page.

    Args:
        path: Where to.
        done: A line a cell that was run, with `cell`, `worst`, `failed` and `refused`.
        refused: Why other combinations are no cells.
        num_legal: Cells that there are.
    """
    path.write_text("\n".join(_lines(done, refused, num_legal)) + "\n", encoding="utf-8")


def _lines(done: Sequence[Mapping[str, Any]], refused: Mapping[Cell, str], num_legal: int) -> Iterator[str]:
    trained = [one for one in done if not one["refused"]]
    failed = [one for one in trained if one["failed"]]
    yield "# Ranks beside one process"
    yield ""
    yield (
        f"{len(trained)} runs on 1, 2 and 4 ranks (gloo), each held beside the same run on one process, at once and "
        f"without recomputation: losses, the gradient of every parameter and the clipped norm of each of 3 steps, and "
        f"every parameter after them. {len(failed)} differ."
    )
    if len(done) < num_legal:
        yield ""
        yield f"These are {len(done)} of {num_legal} cells, drawn evenly; the others were not run on this day."
    yield ""
    yield f"- {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {_processor()}, {platform.system()} {platform.machine()}"
    packages = ("torch", "transformers", "deepspeed", "leanmill")
    yield f"- Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}"
    yield '- Again: `make parity`; a part of it: `make parity ARGS="--ranks 2 --share 0.1"`'
    yield "- The table in code: `tests/parity/cells.py`; that mistakes are caught: `tests/parity/test_mutations.py`"
    yield ""
    yield "What may differ, relative (of weights: of their change, beside the rounding of what is stored):"
    yield ""
    yield "| precision | loss | gradient | norm | weight |"
    yield "|---|---|---|---|---|"
    for name, bounds in BOUNDS.items():
        yield f"| {name} | {bounds.loss:.0e} | {bounds.gradient:.0e} | {bounds.norm:.0e} | {bounds.weight:.0e} |"
    yield ""
    yield from _table("Engines and layouts", ("ranks", "engine", "layout"), trained)
    yield from _table("Techniques", ("technique", "model"), trained)
    yield from _table("Accumulation, recomputation and rows", ("accumulation", "recompute", "rows"), trained)
    yield from _failures(failed)
    yield from _refusals(done, refused)


def _table(title: str, axes: Sequence[str], trained: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def group(cell: Cell) -> tuple[Any, ...]:
        return tuple(getattr(cell, "world_size" if axis == "ranks" else axis) for axis in axes)

    yield f"## {title}"
    yield ""
    yield "The largest difference of a gradient, and of a parameter's change in 3 steps."
    yield ""
    kinds = [f"{name} {quantity}" for name in BOUNDS for quantity in ("gradient", "weight")]
    yield f"| {' | '.join((*axes, 'runs', 'differ', *kinds))} |"
    yield "|---" * (len(axes) + 2 + len(kinds)) + "|"
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for one in trained:
        groups[group(one["cell"])].append(one)
    for key, members in sorted(groups.items(), key=lambda pair: _order(pair[0])):
        numbers = [_worst(members, name, quantity) for name in BOUNDS for quantity in ("gradient", "weight")]
        num_failed = sum(bool(one["failed"]) for one in members)
        yield f"| {' | '.join(map(str, (*key, len(members), num_failed, *numbers)))} |"
    yield ""


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    places = {name: number for names in (LAYOUTS, TECHNIQUES) for number, name in enumerate(names)}
    return tuple((places.get(part, 0), str(part)) for part in key)


def _worst(members: Sequence[Mapping[str, Any]], precision: str, quantity: str) -> str:
    found = [one["worst"][quantity] for one in members if one["cell"].precision == precision and one["worst"]]
    return f"{max(found):.1e}" if found else ""


def _failures(failed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not failed:
        return
    yield "## What differs"
    yield ""
    yield "| cell | step | quantity | family | off by | ratio | looks like |"
    yield "|---|---|---|---|---|---|---|"
    for line in failed:
        for one in line["failed"]:
            numbers = f"{one['error']:.1e} | {one['ratio']:.6g}"
            place = f"{one['step'] + 1} | {one['quantity']} | {one['family']}"
            yield f"| {line['key']} | {place} | {numbers} | {one['reason']} |"
    yield ""


def _refusals(done: Sequence[Mapping[str, Any]], refused: Mapping[Cell, str]) -> Iterator[str]:
    counts = Counter(refused.values()) + Counter(one["refused"] for one in done if one["refused"])
    yield "## What is no cell"
    yield ""
    yield "| combinations | because |"
    yield "|---|---|"
    for why, number in counts.most_common():
        yield f"| {number} | {why.replace('|', ' or ')} |"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} threads)" if names else platform.processor()
