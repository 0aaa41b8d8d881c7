"""Which blocks are on which stage of a pipeline (`layout.pp`), and what its schedules ask for. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

from leanmill.parallel.sequence_plan import DROPOUT


Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv"]
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma3_text"})
"""Compared with one process, parameter by parameter: what comes out of the embeddings goes into the first block as it
is, blocks hand on one tensor and nothing else, and what they are given beside it follows from positions."""


def stages_per_rank(schedule: Schedule, pp: int, split: Sequence[int] | None) -> int:
    """Return how many stages a rank has: what `split` gives each, or as few as the schedule needs.

    Args:
        schedule: `layout.pp_schedule`.
        pp: Ranks of the pipeline.
        split: `layout.pp_split`, first blocks of stages; None where they are balanced.
    """
    if schedule == "interleaved_1f1b" and split is not None:
        return len(split) // pp
    return 1 if schedule in ("gpipe", "1f1b") else 2


def rank_of_stage(stage: int, pp: int, schedule: Schedule) -> int:
    """Return which rank of the pipeline has a stage: in turn, or there and back again for `zbv`."""
    return 2 * pp - 1 - stage if schedule == "zbv" and stage >= pp else stage % pp


def pipeline_problems(
    config: Any, pp: int, schedule: Schedule, split: Sequence[int] | None, num_micro_batches: int | None = None
) -> Iterator[str]:
    """Yield why a model cannot be trained in `pp` parts.

    Args:
        config: The family's config: a mapping or a transformers config; what it leaves out is not judged.
        pp: Ranks that each have some blocks.
        schedule: `layout.pp_schedule`.
        split: `layout.pp_split`, first blocks of stages; None where they are balanced.
        num_micro_batches: Of a step on a rank; None where it is not known.
    """
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    asked, family, blocks = f"layout.pp={pp}", get("model_type"), get("num_hidden_layers")
    if family is not None and family not in FAMILIES:
        yield (
            f"{asked} has not been shown to hold for model type {family!r}, whose embeddings or blocks may hand on "
            f"more than one tensor, but for {', '.join(sorted(FAMILIES))}; set layout.pp=1"
        )
    for key in ("attention_dropout", "embd_pdrop", *DROPOUT):
        if get(key):
            yield (
                f"{asked}: stages would draw the same for different blocks by model.config.{key}={get(key)}; set it "
                f"to 0, or layout.pp=1"
            )
    of_rank = stages_per_rank(schedule, pp, split)
    num_stages = pp * of_rank
    if split is not None:
        yield from _split_problems(split, pp, schedule, num_stages, blocks)
    if isinstance(blocks, int) and blocks < num_stages:
        yield (
            f"{asked} with layout.pp_schedule={schedule} makes {num_stages} stages, and the model has {blocks} blocks; "
            f"set layout.pp={max(1, blocks // of_rank)} at most"
        )
    if num_micro_batches is not None:
        yield from _micro_batch_problems(num_micro_batches, pp, schedule)


def _split_problems(split: Sequence[int], pp: int, schedule: Schedule, num_stages: int, blocks: Any) -> Iterator[str]:
    shown = f"layout.pp_split={list(split)}"
    if list(split[:1]) != [0] or any(first >= second for first, second in pairwise(split)):
        yield f"{shown} names the first block of each stage: it begins with 0 and rises, e.g. [0, 3]"
    if len(split) != num_stages or not num_stages:
        many = f"a multiple of {pp}" if schedule == "interleaved_1f1b" else str(num_stages)
        yield (
            f"{shown} makes {len(split)} stages, and layout.pp={pp} with layout.pp_schedule={schedule} has {many}; "
            f"name as many, or set layout.pp_split=balance"
        )
    if isinstance(blocks, int) and split and split[-1] >= blocks:
        yield f"{shown} begins a stage with block {split[-1]}, and blocks are 0 to {blocks - 1}"


def _micro_batch_problems(number: int, pp: int, schedule: Schedule) -> Iterator[str]:
    """What torch's schedules ask of the number of micro-batches."""
    asked = f"layout.pp={pp} with layout.pp_schedule={schedule}"
    if schedule == "interleaved_1f1b" and number >= pp and number % (number // pp):
        yield (
            f"{asked} takes rounds of at least {pp} micro-batches, as many in each, and a step has {number} on a rank; "
            f"make it a multiple of {pp} with batch.tokens_per_step or batch.tokens_per_micro_batch"
        )
    if schedule != "gpipe" and number < pp:
        yield (
            f"{asked} needs {pp} micro-batches or more, and a step has {number} on a rank; make batch.tokens_per_step "
            f"larger, batch.tokens_per_micro_batch smaller, or set layout.pp_schedule=gpipe"
        )


def balanced(blocks: Sequence[int], before: int, behind: int, num_stages: int) -> list[int]:
    """Return the first blocks of stages, so that the largest one is as small as can be.

    Args:
        blocks: Parameters of each block.
        before: Of what stands before them, on the first stage.
        behind: Of what stands behind them, on the last.
        num_stages: At most as many as blocks.
    """
    last = len(blocks)

    def size(first: int, end: int) -> int:
        return sum(blocks[first:end]) + (before if first == 0 else 0) + (behind if end == last else 0)

    # Largest stage and firsts of the best way to cut the first `end` blocks into so many stages.
    best: dict[int, tuple[int, list[int]]] = {end: (size(0, end), [0]) for end in range(1, last + 1)}
    for number in range(2, num_stages + 1):
        ways = {
            end: [(max(best[first][0], size(first, end)), [*best[first][1], first]) for first in range(number - 1, end)]
            for end in range(number, last + 1)
        }
        best = {end: min(found, key=lambda way: way[0]) for end, found in ways.items()}
    return best[last][1]


def idle_share(schedule: Schedule, pp: int, num_micro_batches: int, of_rank: int = 1) -> float:
    """Return the share of a step in which a rank waits, where stages take equally long and travel takes no time.

    With the forward, input and weight parts of backward equally long (arXiv:2401.10241), `zbv` fills its wait with
    weight gradients; the others wait for (pp - 1) forwards and backwards of a stage.

    Args:
        schedule: `layout.pp_schedule`.
        pp: Ranks of the pipeline.
        num_micro_batches: Of a step on a rank.
        of_rank: Stages of a rank.
    """
    if schedule == "zbv":
        return 0.0
    wait = (pp - 1) / of_rank
    return wait / (num_micro_batches + wait)


def pipeline_numbers(tokens: int, hidden_size: int, num_stages: int, schedule: Schedule) -> int:
    """Return the numbers that the ranks of a pipeline send to each other for some tokens, forward and back.

    Args:
        tokens: In the rows that the pipeline reads.
        hidden_size: Of a token.
        num_stages: Of the pipeline.
        schedule: `layout.pp_schedule`; of `zbv` two neighbours are on one rank.
    """
    return 2 * tokens * hidden_size * (num_stages - (2 if schedule == "zbv" else 1))
