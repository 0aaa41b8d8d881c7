"""Step time with a technique over dense, and what it keeps alive for backward."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import autocast, interleaved, make_loop, ratio, recipe_15m, stepper
from machine import conditions, write_result
from options import DEFAULTS

from leanmill.trainer.loop import Loop


TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "nm_sparsity_2_4": [{"type": "nm_sparsity"}],
    "ternary": [{"type": "ternary"}],
    "lsq": [{"type": "lsq", "weight_bits": 4}],
}
TOKENS = 4096
"""Of a micro-batch."""


def kept_bytes(loop: Loop) -> int:
    """Net memory a training forward leaves allocated for its backward."""
    num_rows = loop.recipe.batch.tokens_per_micro_batch // loop.recipe.data.sequence_length
    batch = loop.data.next_rows(num_rows, rank=0, world_size=1)
    module = loop.engine.module.train()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile, autocast(loop.recipe):
        losses = module(batch)
    del losses
    return sum(event.self_cpu_memory_usage for event in profile.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=DEFAULTS["techniques"]["rounds"])
    parser.add_argument("--warmup", type=int, default=2, help="uncounted steps; 0 where a step takes minutes")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--micro-batches", type=int, default=1, help=f"of {TOKENS} tokens a step")
    parser.add_argument("--staging", default="auto", choices=["auto", "per_step", "per_use"])
    arguments = parser.parse_args()
    num_micro_batches, staging = arguments.micro_batches, arguments.staging
    sections = {
        "batch": {"tokens_per_step": num_micro_batches * TOKENS, "tokens_per_micro_batch": TOKENS},
        "engine": {"type": "single", "staging": staging},
    }
    rounds, warmup, precision = arguments.rounds, arguments.warmup, arguments.precision
    measured_under = conditions()
    recipes = {
        name: recipe_15m(precision=precision, techniques=chosen, **sections) for name, chosen in TECHNIQUES.items()
    }
    precision = recipes["dense"].train.precision
    loops = {name: make_loop(recipe) for name, recipe in recipes.items()}
    seconds = interleaved({name: stepper(loop) for name, loop in loops.items()}, rounds=rounds, warmup=warmup)
    weight_bytes = sum(4 * p.numel() for p in loops["dense"].engine.module.parameters())
    kept = {name: kept_bytes(loop) for name, loop in loops.items()}
    figures: dict[str, Any] = {
        "precision": precision,
        "micro_batches": num_micro_batches,
        "staging": staging,
        "dense_step_seconds_median": statistics.median(seconds["dense"]),
        "rounds": rounds,
    }
    for name in TECHNIQUES:
        if name != "dense":
            figures[f"{name}_over_dense"] = ratio(seconds, name, "dense")
            figures[f"{name}_kept_for_backward_over_weights"] = (kept[name] - kept["dense"]) / weight_bytes
    variant = "" if num_micro_batches == 1 else f"_{num_micro_batches}_micro_batches"
    variant += "" if staging == "auto" else f"_{staging}"
    write_result(f"techniques_{precision}{variant}", figures, measured_under)


if __name__ == "__main__":
    main()
