"""Whole runs of eight steps of a tiny model on local text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from leanmill.checkpoint.reading import read_full_state
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run
from tests.data.samples import write_jsonl


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}


LAST = "checkpoints/step-00000008"
"""Where a run of `recipe` ends."""


def with_text(folder: Path) -> Path:
    """Write the text that runs in `folder` train on."""
    write_jsonl(folder / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(90)])
    return folder


def recipe(folder, name, *techniques, **changes):
    return Recipe(
        run_dir=str(folder / name),
        device="cpu",
        model={"config": {"model_type": "llama", **SIZES}},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        techniques=list(techniques),
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 8, "precision": "fp32", "deterministic": True},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 1, "keep_last": 20, **changes},
        log={"every_steps": 1, "tensorboard": False, "report": False},
    )


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's steps."""
    return [record for record in map(json.loads, (run_dir / "metrics.jsonl").open()) if record["kind"] == "step"]


def resumed(folder, name, *techniques):
    """Run, and run its second half again: all must be bitwise the same.

    Returns:
        Full model and optimizer state, and losses and metrics by step.
    """
    run(recipe(folder, name, *techniques))
    expected = {part: read_full_state(folder / name / LAST, part) for part in ("model", "optimizer")}
    told = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / name)}
    again = f"{name}-again"
    shutil.copytree(folder / name, folder / again)
    for later in range(5, 9):
        shutil.rmtree(folder / again / f"checkpoints/step-{later:08d}")
    assert run(recipe(folder, again, *techniques)).step == 8
    for part, state in expected.items():
        got = read_full_state(folder / again / LAST, part)
        assert got.keys() == state.keys()
        assert all(torch.equal(got[key], value) for key, value in state.items()), part
    assert {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / again)} == told
    return expected, told
