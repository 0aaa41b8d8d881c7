"""Runs with options of routers: resumed bitwise, evaluated as trained, exported where a plain model is the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.export import export_model
from leanmill.recipe.root import Recipe
from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint
from leanmill.trainer.run import run
from tests.data.samples import write_jsonl


MODEL = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 300,
}
IN_TRAINING = {"type": "router", "jitter": 0.1, "capacity_factor": 0.75}


def recipe(folder, technique):
    return Recipe(
        run_dir=str(folder / "run"),
        device="cpu",
        model={"config": MODEL},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        techniques=[technique],
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 4, "precision": "fp32", "deterministic": True, "activation_checkpointing": "full"},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 2},
        log={"every_steps": 1, "tensorboard": False},
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["losses"] for record in lines if record["kind"] == "step"}


@pytest.mark.parametrize("sees_all", [False, True])
def test_resumed_evaluated_and_exported(tmp_path, sees_all):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(60)])
    np.save(tmp_path / "counts.npy", np.arange(300))
    mask = {"counts": str(tmp_path / "counts.npy"), "visible_experts": 3}
    technique = IN_TRAINING if sees_all else IN_TRAINING | {"mask_moe": mask}
    scores = run(recipe(tmp_path, technique)).scores
    told = losses(tmp_path)
    last = tmp_path / "run/checkpoints/step-00000004"
    shutil.rmtree(last)
    assert run(recipe(tmp_path, technique)).step == 4
    assert [losses(tmp_path)[step] for step in (3, 4)] == [told[step] for step in (3, 4)]
    assert evaluate_checkpoint(last).scores["all"].loss == pytest.approx(scores["all"].loss, rel=1e-5)
    if not sees_all:
        with pytest.raises(ConfigError, match=r"router\.mask_moe"):
            export_model(last, tmp_path / "exported")
        return
    export_model(last, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert all(torch.isfinite(value).all() for value in exported.state_dict().values())
    assert not any("around" in name for name in exported.state_dict())
