"""`leanmill profile`: where the time and memory of real steps go, beside what `plan` predicts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from leanmill.plan.plan import Plan
    from leanmill.recipe.root import Recipe
    from leanmill.trainer.profile.result import Part, Profile


NUM_CLASSES = 12


def run(args: argparse.Namespace) -> int:
    """Profile `args.recipe` with `args.overrides`; under torchrun on all its ranks, of which the first prints."""
    from leanmill.cli.rank import leave
    from leanmill.export.run_models import with_models_of_runs
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.local_files import check_files
    from leanmill.trainer.profile.run import profile

    recipe = load_recipe(args.recipe, args.overrides)
    check_files(recipe)
    recipe = with_models_of_runs(recipe)
    found = profile(recipe, num_steps=args.steps, num_before=args.before)
    if found is not None:
        _tell(found, _plan(recipe, found), args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave(0)
    return 0


def _plan(recipe: Recipe, found: Profile) -> Plan:
    from leanmill.plan.plan import plan

    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", found.world_size))
    return plan(recipe, found.world_size, per_node)


def _tell(found: Profile, planned: Plan, args: argparse.Namespace) -> None:
    import json

    document = {**found.to_json(), "plan": _predicted(planned)}
    if args.out:
        from pathlib import Path

        Path(args.out).write_text(json.dumps(document, indent=2), encoding="utf-8")
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(lines(found, planned)))


def _predicted(planned: Plan) -> dict[str, Any]:
    return {
        "engine": planned.engine,
        "held_bytes": planned.held_bytes,
        "peak_bytes": planned.peak_bytes,
        "activation_bytes": planned.memory.transient.get("activations", 0),
        "flops_per_step": planned.flops_per_step,
    }


def lines(found: Profile, planned: Plan) -> list[str]:
    """Return the report as text."""
    rate = found.flops_per_step / found.step_seconds / found.world_size / 1e12
    ranks = "1 process" if found.world_size == 1 else f"{found.world_size} ranks, the first one's times"
    return [
        f"{found.engine} on {ranks}, mean of {found.num_steps} steps: {_time(found.step_seconds)} a step, "
        f"{found.tokens_per_step / found.step_seconds:,.0f} tokens a second, {rate:.3g} TFLOP/s a rank",
        "",
        *_phases(found),
        "",
        *_parts("class of module, without what it calls", found.classes[:NUM_CLASSES], found, counts=True),
        "",
        *_parts("block, with all in it", found.blocks, found, counts=False),
        "",
        *_memory(found, planned),
    ]


def _phases(found: Profile) -> list[str]:
    rows = [("phase", "time", "share", *(("least", "median", "most of ranks") if found.world_size > 1 else ()))]
    for phase, seconds in found.phases.items():
        rows.append((phase, _time(seconds), f"{seconds / found.step_seconds:.1%}", *_spread(found, phase)))
    reached = found.communication.get("any", 0.0)
    rows.append(
        (
            "collectives under way",
            _time(reached),
            f"{reached / found.step_seconds:.1%}",
            *_spread(found, "communication"),
        )
    )
    rows += [
        (f"  {kind}", _time(seconds), f"{seconds / found.step_seconds:.1%}")
        for kind, seconds in found.communication.items()
        if kind != "any"
    ]
    return _aligned(rows)


def _spread(found: Profile, key: str) -> tuple[str, ...]:
    if found.world_size == 1:
        return ()
    return tuple(_time(found.over_ranks[key][which]) for which in ("least", "median", "most"))


def _parts(title: str, parts: list[Part], found: Profile, *, counts: bool) -> list[str]:
    rows = [(title, "forward", "again", "backward", "share", "kept of a micro-batch")]
    return _aligned([*rows, *(_row(part, found, counts=counts) for part in parts)])


def _row(part: Part, found: Profile, *, counts: bool) -> tuple[str, ...]:
    return (
        f"{part.name} x {part.count}" if counts else part.name,
        _time(part.forward),
        _time(part.recomputation) if part.recomputation else "-",
        _time(part.backward),
        f"{part.seconds / found.step_seconds:.1%}",
        _size(part.kept_bytes) if part.kept_bytes else "-",
    )


def _memory(found: Profile, planned: Plan) -> list[str]:
    rows = [
        ("memory of the rank", "measured", "planned"),
        (
            "kept for backward, a micro-batch",
            _size(found.kept_bytes),
            _size(planned.memory.transient.get("activations", 0)),
        ),
        ("model, gradients, optimizer state", "-", _size(planned.held_bytes)),
        ("peak", _size(found.peak_bytes), _size(planned.peak_bytes)),
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    width = max(map(len, rows))
    filled = [row + ("",) * (width - len(row)) for row in rows]
    widths = [max(len(row[index]) for row in filled) for index in range(width)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
