"""`leanmill plan`: what a run will need, before any device is touched."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.table import Table

    from leanmill.plan.duration import Duration
    from leanmill.plan.plan import Plan


COMFORTABLE_SHARE = 0.9
"""Share of a rank's memory above which a plan that fits may still not."""


def run(args: argparse.Namespace) -> int:
    """Print the plan of `args.recipe`, of each phase that trains, on `args.nodes` x `args.gpus_per_node` ranks."""
    from leanmill.core.errors import ConfigError
    from leanmill.export.run_models import with_models_of_runs
    from leanmill.recipe.io import load_recipe

    recipe = with_models_of_runs(load_recipe(args.recipe, args.overrides))
    from leanmill.plan.plan import DEFAULT_RANK_MEMORY_GIB, plan

    world_size = args.nodes * args.gpus_per_node
    memory_gib = args.rank_memory_gib or DEFAULT_RANK_MEMORY_GIB
    from leanmill.phases.models import models_to_come, training_recipes

    trained = training_recipes(recipe) or [recipe]
    if args.search:
        if recipe.phases:
            raise ConfigError("--search takes one stretch of training, and the recipe has phases; give one of them")
        from leanmill.cli.plan_search import search

        return search(recipe, args, memory_gib)
    to_come = models_to_come(recipe)
    results = [
        plan(phase, world_size, args.gpus_per_node, rank_memory_gib=memory_gib, to_come=to_come) for phase in trained
    ]
    times = [_duration(result, args) for result in results]
    if args.json:
        import json
        from dataclasses import asdict

        documents = [
            result.to_json() | {"duration": None if time is None else asdict(time)}
            for result, time in zip(results, times, strict=True)
        ]
        print(json.dumps(documents if recipe.phases else documents[0], indent=2))
        return 0
    for result, time in zip(results, times, strict=True):
        _show(result, time, is_told=args.rank_memory_gib is not None)
    return 0


def _duration(result: Plan, args: argparse.Namespace) -> Duration | None:
    from leanmill.core.errors import ConfigError
    from leanmill.plan.duration import duration

    if args.price_per_rank_hour is not None and args.tokens_per_second is None and args.rank_tflops is None:
        raise ConfigError("--price-per-rank-hour needs a rate; give --rank-tflops or --tokens-per-second too")
    return duration(
        flops_per_token=result.flops_per_token,
        tokens_per_step=result.tokens_per_step,
        total_tokens=result.total_tokens,
        world_size=result.world_size,
        tokens_per_second=args.tokens_per_second,
        rank_tflops=args.rank_tflops,
        price_per_rank_hour=args.price_per_rank_hour,
    )


def _show(result: Plan, time: Duration | None, *, is_told: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{result.recipe} on {result.world_size} ranks, engine {result.engine}: {result.why_engine}")
    for line in result.mixture:
        console.print(line, soft_wrap=True, markup=False)
    for table in (_run_table(result, time), _memory_table(result), _engines_table(result)):
        console.print(table)
    for line in _verdict(result, is_told=is_told):
        console.print(line, soft_wrap=True, markup=False)


def _verdict(result: Plan, *, is_told: bool) -> list[str]:
    """Say whether it fits, and what to type where it does not."""
    memory = _size(result.rank_memory_bytes)
    source = "" if is_told else " (assumed; give yours with --rank-memory-gib)"
    peak = _size(result.peak_bytes)
    if result.fits:
        is_tight = result.peak_bytes > COMFORTABLE_SHARE * result.rank_memory_bytes
        rest = ", which leaves little for what is not counted here: the CUDA context, fragmentation" if is_tight else ""
        return [f"fits: a rank needs about {peak} of its {memory}{source}{rest}"]
    lines = [f"DOES NOT FIT: a rank needs about {peak} and has {memory}{source}"]
    enough = {typed: size for typed, size in result.remedies.items() if size <= result.rank_memory_bytes}
    if enough:
        lines += ["any one of these is enough:" if len(enough) > 1 else "this is enough:"]
        lines += [f"  {typed}  ({_size(size)})" for typed, size in enough.items()]
    for typed, size in result.remedies.items():
        if typed not in enough:
            lines += [f"not enough either, at {_size(size)}: {typed}"]
    if not enough:
        lines += ["take a smaller model or ranks with more memory"]
    return lines


def _run_table(result: Plan, time: Duration | None) -> Table:
    rows = {
        "parameters": f"{_count(result.num_parameters)} ({result.num_parameters:,})",
        "active for a token": _count(result.num_active),
        "trainable": _count(result.num_trainable),
        "added by techniques": _count(result.num_technique),
        "tokens a step": f"{result.tokens_per_step:,} in {result.num_micro_batches} micro-batches a rank",
        "FLOPs a token": f"{result.flops_per_token:.3g}",
        "FLOPs a step": f"{result.flops_per_step:.3g}",
        **_length_rows(result),
        **({} if time is None else _time_rows(time)),
        "a checkpoint": _size(result.checkpoint_bytes),
    }
    table = _table("run", "quantity", "value")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _length_rows(result: Plan) -> dict[str, str]:
    if result.num_steps is None or result.total_tokens is None or result.total_flops is None:
        return {"steps": "by train.epochs, known once the data is tokenised"}
    return {
        "steps": f"{result.num_steps:,}",
        "tokens of the run": _count(result.total_tokens),
        "tokens a parameter": f"{result.total_tokens / max(1, result.num_parameters):.3g}",
        "FLOPs of the run": f"{result.total_flops:.3g}",
    }


def _time_rows(time: Duration) -> dict[str, str]:
    rows = {"tokens a second": _count(time.tokens_per_second), "a step": f"{time.step_seconds:.3g} s"}
    if time.days is not None and time.rank_hours is not None:
        rows["the run"] = f"{time.days:.3g} days, {_count(time.rank_hours)} rank-hours"
    if time.cost is not None:
        rows["cost"] = f"{time.cost:,.2f}"
    return rows


def _memory_table(result: Plan) -> Table:
    table = _table(f"memory of one rank, {result.engine}", "part", "size", "how long")
    kinds = {"held": "whole step", "transient": "inside a step, estimate", "host": "in host memory or on NVMe"}
    for kind, meaning in kinds.items():
        for part, size in getattr(result.memory, kind).items():
            table.add_row(part, _size(size), meaning)
    table.add_row("model, gradients, optimizer state", _size(result.held_bytes), "total held", style="bold")
    table.add_row("peak", _size(result.peak_bytes), "all parts at once", style="bold")
    return table


def _engines_table(result: Plan) -> Table:
    table = _table("the same run under other engines", "engine", "held", "peak")
    for name, memory in result.alternatives.items():
        table.add_row(name, _size(sum(memory.held.values())), _size(memory.peak))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index == 1 and len(columns) > 2 else "left")
    return table


def _count(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
