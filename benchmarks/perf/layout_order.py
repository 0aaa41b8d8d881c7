"""The order that `leanmill plan --search` predicts of layouts, against measured steps of a small model.

Rates are measured on this machine, the steps of each layout are predicted from them, and every layout then trains
the model on two ranks. Layouts take turns, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from machine import conditions, write_result


NUM_RANKS = 2
MODEL = {
    "model_type": "llama",
    "hidden_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 864,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
RECIPE: dict[str, Any] = {
    "name": "order",
    "device": "cpu",
    "model": {"config": MODEL},
    "data": {"sequence_length": 256, "tokenizer": {"vocab_size": 4096}},
    "batch": {"tokens_per_step": 4096},
    "train": {"steps": 7, "precision": "fp32"},
    "eval": {"tokens_per_domain": 256},
    "checkpoint": {"resume": "never"},
    "log": {"every_steps": 1, "tensorboard": False, "report": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "ddp, 4 micro-batches": {"engine": "ddp", "rows": 2},
    "fsdp": {"engine": "fsdp"},
    "fsdp, 4 micro-batches": {"engine": "fsdp", "rows": 2},
    "fsdp, all recomputed": {"engine": "fsdp", "recompute": "full"},
    "ZeRO-1": {"engine": {"type": "deepspeed", "stage": 1}},
    "ZeRO-3": {"engine": {"type": "deepspeed", "stage": 3}},
    "ddp, cp 2": {"engine": "ddp", "layout": {"cp": 2}, "rows": 16},
    "ddp, tp 2": {"engine": "ddp", "layout": {"tp": 2}, "rows": 16},
}


def recipe_of(layout: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """The recipe of a layout; every one has the same tokens a step."""
    raw = {**RECIPE, "run_dir": run_dir, "engine": layout["engine"], "layout": layout.get("layout", {})}
    raw["batch"] = RECIPE["batch"] | {"tokens_per_micro_batch": 256 * layout.get("rows", 8)}
    raw["train"] = RECIPE["train"] | {"activation_checkpointing": layout.get("recompute", "none")}
    return raw


def predicted(layout: dict[str, Any], rates: Any) -> float:
    """Seconds of a step."""
    from leanmill.parallel.layout import resolve_layout
    from leanmill.plan.layouts.candidates import Candidate
    from leanmill.plan.layouts.search import step_time
    from leanmill.plan.layouts.work import Work
    from leanmill.plan.subject import Subject
    from leanmill.recipe.root import Recipe
    from leanmill.recipe.rules import micro_batches_of_step

    recipe = Recipe.model_validate(recipe_of(layout, "unused"))
    subject = Subject.of(recipe, NUM_RANKS)
    one = Candidate(
        recipe=recipe,
        layout=resolve_layout(recipe.layout, recipe.engine, NUM_RANKS),
        subject=subject,
        num_micro_batches=micro_batches_of_step(recipe, recipe.layout.data_size(NUM_RANKS)),
    )
    return step_time(one, Work.of(subject), rates, NUM_RANKS).seconds


def measured(layout: dict[str, Any], folder: Path) -> float:
    """Median seconds of the steps after the first two."""
    run_dir = tempfile.mkdtemp(dir=folder)
    path = Path(run_dir) / "given.yaml"
    path.write_text(yaml.safe_dump(recipe_of(layout, f"{run_dir}/run")))
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [
        torchrun,
        "--standalone",
        "--nproc-per-node",
        str(NUM_RANKS),
        "-m",
        "leanmill.cli.rank",
        "--config",
        path,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (Path(run_dir) / "run" / "metrics.jsonl").read_text().splitlines())
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each layout")
    args = parser.parse_args()
    from leanmill.plan.layouts.measure import measure
    from leanmill.plan.layouts.rates import as_yaml

    measured_under = conditions()
    rates = measure(NUM_RANKS, "fp32", "cpu")
    foretold = {name: predicted(layout, rates) for name, layout in LAYOUTS.items()}
    found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, layout in LAYOUTS.items():
                found[name].append(measured(layout, Path(folder)))
    seconds = {name: min(several) for name, several in found.items()}
    pairs = [(a, b) for a in LAYOUTS for b in LAYOUTS if a < b]
    agree = sum((foretold[a] < foretold[b]) == (seconds[a] < seconds[b]) for a, b in pairs)
    figures = {
        "layouts": {
            name: {"predicted_seconds": foretold[name], "measured_seconds": seconds[name], "runs": found[name]}
            for name in sorted(LAYOUTS, key=seconds.__getitem__)
        },
        "pairs_in_the_predicted_order": agree / len(pairs),
        "fastest_predicted": min(foretold, key=foretold.__getitem__),
        "fastest_measured": min(seconds, key=seconds.__getitem__),
        "rates": yaml.safe_load(as_yaml(rates)),
    }
    write_result("layout_order", figures, measured_under)


if __name__ == "__main__":
    main()
