"""Step time with a technique over dense, and what it keeps alive for backward."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import conditions, interleaved, make_loop, ratio, recipe_15m, stepper, write_result

from leanmill.trainer.loop import Loop


TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "nm_sparsity_2_4": [{"type": "nm_sparsity"}],
    "ternary": [{"type": "ternary"}],
}


def kept_bytes(loop: Loop) -> int:
    """Net memory a training forward leaves allocated for its backward."""
    num_rows = loop.recipe.batch.tokens_per_micro_batch // loop.recipe.data.sequence_length
    batch = loop.data.next_rows(num_rows, rank=0, world_size=1)
    module = loop.engine.module.train()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            losses = module(batch)
    del losses
    return sum(event.self_cpu_memory_usage for event in profile.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    measured_under = conditions()
    loops = {name: make_loop(recipe_15m(techniques=techniques)) for name, techniques in TECHNIQUES.items()}
    seconds = interleaved({name: stepper(loop) for name, loop in loops.items()}, rounds=rounds)
    weight_bytes = sum(4 * p.numel() for p in loops["dense"].engine.module.parameters())
    kept = {name: kept_bytes(loop) for name, loop in loops.items()}
    figures: dict[str, Any] = {"dense_step_seconds_median": statistics.median(seconds["dense"]), "rounds": rounds}
    for name in TECHNIQUES:
        if name != "dense":
            figures[f"{name}_over_dense"] = ratio(seconds, name, "dense")
            figures[f"{name}_kept_for_backward_over_weights"] = (kept[name] - kept["dense"]) / weight_bytes
    write_result("techniques", figures, measured_under)


if __name__ == "__main__":
    main()
