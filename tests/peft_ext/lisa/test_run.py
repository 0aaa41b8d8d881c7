"""Runs whose layers take turns: a resume inside an interval is bitwise, the checkpoint holds what trains."""

import json

import pytest
import torch

from leanmill.checkpoint.reading import read_full_state
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run
from tests.data.samples import write_jsonl


MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lisa")
    write_jsonl(folder / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(60)])
    return folder


def recipe(folder, name, *techniques, steps=STEPS, **more):
    return Recipe(
        name=name,
        run_dir=str(folder / name),
        device="cpu",
        model={"config": MODEL},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        techniques=[{"type": "lisa", "num_layers": 1, "every_steps": 4}, *techniques],
        schedule={"type": "constant"},
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": steps, "precision": "fp32", "deterministic": True},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 2, "keep_last": 10},
        log={"every_steps": 1, "tensorboard": False, "report": False},
        **more,
    )


def state(run_dir, step, part="model"):
    return read_full_state(run_dir / f"checkpoints/step-{step:08d}", part)


@pytest.fixture(scope="module")
def whole(folder):
    run(recipe(folder, "whole"))
    return folder / "whole"


def layers_with_state(run_dir, step):
    return {name.split(".")[2] for name in state(run_dir, step, "optimizer") if ".layers." in name}


def test_a_checkpoint_holds_optimizer_state_of_what_trained_in_its_step(whole):
    sets = {step: layers_with_state(whole, step) for step in (2, 4, 6, 8, 10)}
    assert sets[2] == sets[4]
    assert sets[6] == sets[8]  # also where the next step draws anew
    assert len({frozenset(found) for found in sets.values()}) > 1
    assert all(len(found) == 1 for found in sets.values())
    assert any(name.startswith("model.embed_tokens.weight/") for name in state(whole, 2, "optimizer"))


@pytest.mark.parametrize("stopped_at", [4, 6])
def test_a_resume_is_bitwise_inside_an_interval_and_between_two(folder, whole, stopped_at):
    run(recipe(folder, f"until-{stopped_at}", steps=stopped_at))
    run(recipe(folder, f"until-{stopped_at}"))
    resumed = folder / f"until-{stopped_at}"
    for part in ("model", "optimizer"):
        expected, found = state(whole, STEPS, part), state(resumed, STEPS, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_resume_may_go_on_with_more_layers(folder):
    run(recipe(folder, "more", steps=6))
    given = recipe(folder, "more").model_dump()
    given["techniques"][0]["num_layers"] = 3
    given["checkpoint"]["accept_changes"] = ["techniques.lisa"]
    run(Recipe.model_validate(given))
    assert len(layers_with_state(folder / "more", STEPS)) == 3


def test_adapters_that_take_turns_are_saved_all(folder, whole):
    from transformers import AutoModelForCausalLM

    from leanmill.trainer.rebuild import rebuild

    path = folder / "base"
    if not path.exists():
        rebuilt = rebuild(whole / f"checkpoints/step-{STEPS:08d}")
        rebuilt.model.save_pretrained(path)
        AutoModelForCausalLM.from_pretrained(path)
    for where in ("weight", "branch"):
        name = f"adapters-{where}"
        given = recipe(folder, name, {"type": "lora", "rank": 2, "where": where}).model_dump()
        given["model"] = {"path": str(path)}
        run(Recipe.model_validate(given))
        saved = state(folder / name, STEPS)
        assert {key.split(".")[2] for key in saved} == {"0", "1", "2", "3"}
        assert all("lora_" in key for key in saved)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert all(record["losses"]["total"] > 0 for record in records if record["kind"] == "step")
