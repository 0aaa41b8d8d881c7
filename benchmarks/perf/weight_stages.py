"""Step time of each technique that works on weights alone over dense, and of QuEST with both operands in 4 bits."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from common import interleaved, make_loop, ratio, recipe_15m, stepper
from machine import conditions, write_result


TOKENS, NUM_MICRO_BATCHES = 4096, 2
WEIGHTS_ALONE: dict[str, dict[str, Any]] = {
    "nm_sparsity": {"type": "nm_sparsity"},
    "rigl": {"type": "rigl", "density": 0.1},
    "mask_llm": {"type": "mask_llm", "num_kept": 2, "group_size": 4},
    "ternary": {"type": "ternary"},
    "binary": {"type": "binary"},
    "paretoq": {"type": "paretoq", "weight_bits": 2},
    "lsq": {"type": "lsq", "weight_bits": 4},
    "int_quant": {"type": "int_quant", "weight_bits": 4},
    "dual_binary": {"type": "dual_binary", "granularity": "group", "group_size": 32},
    "fp_quant": {"type": "fp_quant", "weight_format": "mxfp4"},
    "pv_tuning": {"type": "pv_tuning", "weight_bits": 2, "group_size": 32},
}
BOTH_OPERANDS = {"quest_w4a4": {"type": "quest", "weight_bits": 4, "activation_bits": 4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1, help="uncounted steps")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WEIGHTS_ALONE | BOTH_OPERANDS)}; default all")
    arguments = parser.parse_args()
    measured_under = conditions()
    wanted = {
        name: one for name, one in (WEIGHTS_ALONE | BOTH_OPERANDS).items() if name in (arguments.names or (name,))
    }
    batch = {"tokens_per_step": NUM_MICRO_BATCHES * TOKENS, "tokens_per_micro_batch": TOKENS}
    recipes = {
        name: recipe_15m(precision=arguments.precision, techniques=techniques, batch=batch)
        for name, techniques in {"dense": [], **{name: [one] for name, one in wanted.items()}}.items()
    }
    loops = {name: make_loop(recipe) for name, recipe in recipes.items()}
    steps = {name: stepper(loop) for name, loop in loops.items()}
    seconds = interleaved(steps, rounds=arguments.rounds, warmup=arguments.warmup)
    precision = recipes["dense"].train.precision
    figures = {
        "precision": precision,
        "micro_batches": NUM_MICRO_BATCHES,
        "rounds": arguments.rounds,
        "dense_step_seconds_median": statistics.median(seconds["dense"]),
        "over_dense": {name: ratio(seconds, name, "dense") for name in wanted},
    }
    write_result(f"weight_stages_{precision}", figures, measured_under)


if __name__ == "__main__":
    main()
