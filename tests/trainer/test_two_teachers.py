"""A run with two teachers: both losses are trained, logged under names of their own, resumed and planned."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.plan.plan import plan
from leanmill.recipe.root import Recipe
from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint
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
TEACHER_WIDTHS = (8, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write_jsonl(folder / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(60)])
    for width in TEACHER_WIDTHS:
        torch.manual_seed(width)
        config = AutoConfig.for_model("llama", **SIZES | {"hidden_size": width})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"teacher-{width}")
    return folder


def recipe(folder, name, *weights):
    distill = [
        {"type": "distill", "teacher": str(folder / f"teacher-{width}"), "weight": weight}
        for width, weight in zip(TEACHER_WIDTHS, weights, strict=False)
    ]
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
        techniques=distill,
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 4, "precision": "fp32", "deterministic": True},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 2},
        log={"every_steps": 1, "tensorboard": False, "report": False},
    )


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["losses"] for record in records if record["kind"] == "step"}


def test_both_are_trained_logged_and_resumed(folder):
    both = recipe(folder, "both", 0.5, 0.25)
    scores = run(both).scores
    last = folder / "both/checkpoints/step-00000004"
    assert evaluate_checkpoint(last).scores["all"].loss == pytest.approx(scores["all"].loss, rel=1e-5)
    run(recipe(folder, "first", 0.5))
    told = losses(folder / "both")
    for step in told.values():
        assert step.keys() == {"cross_entropy", "distill", "distill_2", "total"}
        parts = step["cross_entropy"] + 0.5 * step["distill"] + 0.25 * step["distill_2"]
        assert step["total"] == pytest.approx(parts, rel=1e-5)
        assert step["distill"] != pytest.approx(step["distill_2"], rel=1e-3)
    alone = losses(folder / "first")
    assert alone[1]["distill"] == pytest.approx(told[1]["distill"], rel=1e-5)
    assert alone[4]["cross_entropy"] != told[4]["cross_entropy"], "the second teacher must train too"

    shutil.rmtree(last)
    assert run(both).step == 4
    again = losses(folder / "both")
    assert [again[step] for step in (3, 4)] == [told[step] for step in (3, 4)]


def test_the_plan_counts_both(folder):
    one, two = (plan(recipe(folder, "x", *weights)).memory for weights in ((1.0,), (1.0, 1.0)))
    size = {width: sum(p.numel() for p in _teacher(folder, width).parameters()) for width in TEACHER_WIDTHS}
    assert one.held["teacher"] == 4 * size[8]
    assert two.held["teacher"] == 4 * (size[8] + size[24])
    assert two.transient["logits"] > one.transient["logits"]


def _teacher(folder, width):
    return AutoModelForCausalLM.from_pretrained(folder / f"teacher-{width}")
