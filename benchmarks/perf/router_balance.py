"""What synchronising the loads of experts over ranks costs a step at 4 ranks: calls, bytes, and the extra time.

One run, whose steps alternate between reducing the loads and leaving each rank with its own, in pairs of either order;
the extra of a pair is what reducing costs, waiting for slower ranks included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import stepper
from machine import conditions, write_result
from options import DEFAULTS
from torch import Tensor

from leanmill.models.build import build_on_meta
from leanmill.moe.loads import loads as counting
from leanmill.parallel.build import build_engine
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.loop import Loop
from leanmill.trainer.prepare import prepare


MODEL = {
    "model_type": "mixtral",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""11M parameters, 4M of them for a token."""
LENGTH, MICRO_BATCHES = 256, 2
ROWS_A_RANK = (2, 16)
"""Of a step: one so small that a collective weighs most, and one of as many tokens as a rank has in training."""
WARMUP_STEPS = 2


class RandomRows:
    """Rows of random tokens; what they say costs the same."""

    position_tokens = 0

    def next_rows(self, num_rows: int, *, rank: int, world_size: int) -> dict[str, Tensor]:
        ids = torch.randint(MODEL["vocab_size"], (num_rows // world_size, LENGTH))  # type: ignore[arg-type]
        positions = torch.arange(LENGTH).expand_as(ids).contiguous()
        return {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": positions, "row_ids": ids[:, 0]}


def make_loop(num_ranks: int, rows_a_rank: int) -> Loop:
    tokens = num_ranks * rows_a_rank * LENGTH
    recipe = Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODEL},
            "data": {"sequence_length": LENGTH},
            "techniques": [{"type": "router_balance", "scope": "global_batch", "estimator": "running"}],
            "engine": "ddp",
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // num_ranks // MICRO_BATCHES},
            "train": {"steps": 100_000, "precision": "fp32"},
        }
    )
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=num_ranks, local_rank=rank, device=torch.device("cpu"))
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0)
    prepared = prepare(recipe, build_on_meta(recipe.model, vocab_size=None), engine, num_micro_batches=MICRO_BATCHES)
    loop = Loop(
        recipe=recipe,
        engine=engine,
        data=RandomRows(),  # type: ignore[arg-type]
        step_rules=prepared.techniques.step_rules,
        observers=(),
        num_steps=100_000,
        num_micro_batches=MICRO_BATCHES,
        save=lambda step: None,
        evaluate=lambda step: None,
    )
    loop.start()
    return loop


def num_reduced(loop: Loop) -> int:
    """How many numbers one reduction of loads has: counts of all layers, and what metrics add up beside them."""
    (loads,) = (rule for rule in loop.step_rules if isinstance(rule, counting.Loads))
    assert loads.last_step is not None
    return loads.last_step.numel()


def timed_pairs(step: Callable[[], None], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of steps that reduce loads and of ones that do not, in pairs; and the reductions of a step that does."""
    reduce, calls = counting.reduced, 0

    def counted(tensor: Tensor, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return reduce(tensor, *args)

    functions = {"reduced": counted, "own": lambda tensor, *args: tensor.clone()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    try:
        for number in range(rounds):
            # Either order, so that drift of the machine favours none.
            for name in sorted(functions, reverse=bool(number % 2)):
                counting.reduced = functions[name]  # type: ignore[assignment]
                dist.barrier()
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
    finally:
        counting.reduced = reduce
    return seconds, calls // rounds


def alone(size: int, times: int = 50) -> float:
    """Median seconds of such a reduction when all ranks come to it together."""
    tensor, seconds = torch.ones(size, dtype=torch.float64), []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measured(loop: Loop, rows_a_rank: int, rounds: int) -> dict[str, Any]:
    """Of steps with this many rows."""
    step = stepper(loop)
    for _ in range(WARMUP_STEPS):
        step()
    size = num_reduced(loop)
    seconds, calls = timed_pairs(step, rounds)
    extra = [a - b for a, b in zip(seconds["reduced"], seconds["own"], strict=True)]
    low, middle, high = statistics.quantiles(extra, n=4)
    once, step_seconds = alone(size), statistics.median(seconds["own"])
    return {
        "extra_share_of_a_step": middle / step_seconds,
        "extra_share_of_a_step_quartiles": [low / step_seconds, high / step_seconds],
        "share_of_a_step_when_ranks_come_together": calls * once / step_seconds,
        "extra_seconds_median": middle,
        "step_seconds_median": step_seconds,
        "calls_a_step": calls,
        "numbers_a_call": size,
        "bytes_a_rank_hands_over_a_step": 8 * size * calls,
        "seconds_of_a_call_when_ranks_come_together": once,
        "ranks": dist.get_world_size(),
        "layers": MODEL["num_hidden_layers"],
        "experts": MODEL["num_local_experts"],
        "micro_batches": MICRO_BATCHES,
        "tokens_a_rank": rows_a_rank * LENGTH,
        "rounds": rounds,
    }


def work(rounds: int, folder: Path) -> None:
    """What every rank does."""
    torch.set_num_threads(1)
    num_ranks = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=int(os.environ["RANK"]),
        world_size=num_ranks,
        timeout=timedelta(seconds=120),
    )
    measured_under = conditions()
    figures = {
        f"{rows * LENGTH} tokens a rank": measured(make_loop(num_ranks, rows), rows, max(8, rounds * 4 // (2 + rows)))
        for rows in ROWS_A_RANK
    }
    if dist.get_rank() == 0:
        measured_under["command"] = f"python benchmarks/perf/router_balance.py --ranks {num_ranks} --rounds {rounds}"
        write_result("router_balance", figures, measured_under)
    dist.barrier()
    os._exit(0)  # gloo threads that ran collectives inside autograd may abort at the interpreter's exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=DEFAULTS["router_balance"]["rounds"])
    parser.add_argument("--meeting", type=Path, help="set for the ranks that this script starts")
    arguments = parser.parse_args()
    if arguments.meeting is not None:
        work(arguments.rounds, arguments.meeting)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--meeting", folder]
        world = {"WORLD_SIZE": str(arguments.ranks), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(command, env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(arguments.ranks)
        ]
        codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
