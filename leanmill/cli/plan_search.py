"""What `leanmill plan --search` does and prints."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from leanmill.plan.layouts.rates import Rates
    from leanmill.plan.layouts.search import Found, Ranked
    from leanmill.recipe.root import Recipe


NUM_SHOWN = 8
"""Layouts in the table, unless asked for more."""


def search(recipe: Recipe, args: argparse.Namespace, memory_gib: float) -> int:
    """Search the layouts of one recipe and print the best, the runners-up and why they lost.

    Args:
        recipe: One that trains, without phases.
        args: Of the command line.
        memory_gib: Of a rank.
    """
    from leanmill.plan.layouts.search import search as find

    found = find(
        recipe,
        args.nodes * args.gpus_per_node,
        args.gpus_per_node,
        rates=_rates(recipe, args),
        rank_memory_gib=memory_gib,
        nvme_path=args.nvme_path,
    )
    if args.json:
        import json

        print(json.dumps(found.to_json(), indent=2))
    else:
        _show(found, args.show or NUM_SHOWN)
    return 0


def _rates(recipe: Recipe, args: argparse.Namespace) -> Rates:
    from leanmill.plan.layouts.rates import as_yaml, read_rates, with_given

    if args.rates == "measured":
        import torch

        from leanmill.parallel.precision import resolve_precision
        from leanmill.plan.layouts.measure import measure

        device = "cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu"
        rates = measure(args.gpus_per_node, resolve_precision(recipe.train.precision, device), device)
    else:
        rates = read_rates(args.rates)
    rates = with_given(rates, matmul_tflops=args.matmul_tflops, link_gb=args.link_gb, node_link_gb=args.node_link_gb)
    if args.rates_out:
        from pathlib import Path

        Path(args.rates_out).write_text(as_yaml(rates), encoding="utf-8")
    return rates


def _show(found: Found, number: int) -> None:
    from rich.console import Console

    from leanmill.plan.layouts.search import as_yaml

    console = Console(highlight=False, soft_wrap=True)
    machines = found.world_size // found.per_node
    console.print(
        f"{found.recipe.name} on {machines} x {found.per_node} ranks of {found.rank_memory_bytes / 2**30:.0f} GiB, "
        f"rates: {found.rates.name}; {found.num_tried:,} legal runs tried",
        markup=False,
    )
    for line in ("", *_rows(found, _chosen(found, number)), "", "where the step of the best goes:"):
        console.print(line, markup=False)
    for line in _parts(found.best):
        console.print(f"  {line}", markup=False)
    if found.refused:
        console.print("refused by the package's own checks, such as:", markup=False)
        for reason in _reasons(found):
            console.print(f"  {reason}", markup=False)
    console.print("\npaste into the recipe:\n", markup=False)
    console.print(textwrap.indent(as_yaml(found.best.candidate, found.recipe), "  "), markup=False, end="")


def _chosen(found: Found, number: int) -> list[Ranked]:
    """The best and who came next; of each kind that is not among those the first, so that one sees why it lost."""
    shown = found.ranked[:number]
    kinds = {one.kind for one in shown}
    for one in found.ranked[number:]:
        if one.kind not in kinds:
            kinds.add(one.kind)
            shown.append(one)
    return shown


def _rows(found: Found, shown: list[Ranked]) -> list[str]:
    rows = [("layout", "micro-batches", "recompute", "step", "peak", "why it lost")]
    for one in shown:
        recipe = one.candidate.recipe
        rows.append(
            (
                one.name,
                f"{one.candidate.num_micro_batches} x {recipe.batch.tokens_per_micro_batch:,}",
                recipe.train.activation_checkpointing,
                _time(one.time.seconds),
                f"{one.peak_bytes / 2**30:.3g} GiB",
                one.reason or "the best",
            )
        )
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _parts(best: Ranked) -> list[str]:
    from leanmill.plan.layouts.step_time import MEANING

    total = best.time.seconds
    lines = [
        f"{name:<15} {_time(best.time.parts[name]):>8} {best.time.parts[name] / total:>5.0%}  {meaning}"
        for name, meaning in MEANING.items()
        if best.time.parts[name] > 0.0005 * total
    ]
    if best.time.hidden_seconds:
        lines.append(f"{'hidden':<15} {_time(best.time.hidden_seconds):>8}        communication beside computing")
    if best.time.offload_hideable:
        lines.append(
            f"{'could be hidden':<15} {_time(best.time.offload_hideable):>8}        "
            f"by updating layers during backward, which no engine here does"
        )
    return lines


def _reasons(found: Found, number: int = 4) -> list[str]:
    """The most frequent ones, of each key one."""
    shown: dict[str, str] = {}
    for reason, count in found.refused.items():
        shown.setdefault(reason.partition("=")[0], f"{reason} ({count}x)")
    return list(shown.values())[:number]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
