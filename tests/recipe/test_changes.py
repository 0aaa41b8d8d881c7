"""What a resume says of a changed recipe, and what it refuses."""

from __future__ import annotations

import json

import pytest

from leanmill.core.errors import ConfigError
from leanmill.recipe.changes import FREE, UNSAID, changes, check_accepted, is_accepted
from leanmill.recipe.earlier import as_meant, going_on
from leanmill.recipe.io import apply_override, validate_recipe
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import num_steps


CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 4096}
TERNARY, SPARSE = {"type": "ternary"}, {"type": "nm_sparsity"}


def recipe_of(*overrides: str, **sections: object) -> Recipe:
    raw = {"model": {"config": CONFIG}, "train": {"total_tokens": 1_000_000}, **sections}
    for override in overrides:
        apply_override(raw, override)
    return validate_recipe(raw)


def saved(recipe: Recipe) -> dict:
    return json.loads(recipe.model_dump_json())


def keys(old: Recipe, new: Recipe) -> list[str]:
    return [change.key for change in changes(saved(old), new)]


@pytest.mark.parametrize(
    "override",
    [
        "name=other", "run_dir=elsewhere", "device=cpu", "engine=fsdp", "layout.ep=2", "eval.every_steps=5",
        "checkpoint.keep_last=3", "log.every_steps=1", "cluster.step_timeout_seconds=9", "train.total_tokens=2000000",
        "train.compile=true",
        "train.activation_checkpointing=full", "train.non_finite=skip", "batch.tokens_per_micro_batch=8192",
        "model.attention=eager", "data.cache_dir=/elsewhere",
    ],
)  # fmt: skip
def test_said_only(override):
    found = changes(saved(recipe_of()), recipe_of(override))
    assert [change.key for change in found] == [override.partition("=")[0] + (".type" if "engine" in override else "")]
    assert str(found[0]).endswith(str(found[0].new))
    check_accepted(found, [], "step-1")


def test_of_workers_only_their_number_changes_unasked():
    low_comm = "layout.low_comm={type: diloco, workers: 2, every_steps: 10}"
    for override, is_free in (("workers=4", True), ("patience_seconds=9", True), ("every_steps=20", False)):
        (found,) = changes(saved(recipe_of(low_comm)), recipe_of(low_comm, f"layout.low_comm.{override}"))
        assert is_accepted(found, []) == is_free


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e-4", "optimizer.weight_decay=0", "optimizer.betas=[0.9, 0.99]", "optimizer.type=lion",
        "optimizer.lookahead={every: 5}", "schedule.type=wsd", "schedule.warmup_steps=7", "batch.tokens_per_step=65536",
        "train.max_grad_norm=0.5", "train.cross_entropy_weight=0.5", "train.precision=fp32",
        "model.config.num_hidden_layers=3", "model.config.attention_dropout=0.1", "techniques=[{type: ternary}]",
    ],
)  # fmt: skip
def test_refused_unless_accepted(override):
    key = override.partition("=")[0] + (".ternary" if "ternary" in override else "")
    found = changes(saved(recipe_of()), recipe_of(override))
    with pytest.raises(ConfigError) as caught:
        check_accepted(found, [], "runs/x/checkpoints/step-1")
    message = str(caught.value)
    assert "\n" not in message
    assert f"{key} " in message
    assert "runs/x/checkpoints/step-1" in message
    typed = message.partition("'checkpoint.accept_changes=[")[2].partition("]")[0].split(",")
    check_accepted(found, typed, "step-1")
    check_accepted(found, [key.partition(".")[0]], "step-1")
    with pytest.raises(ConfigError):
        check_accepted(found, ["log", key[:-1]], "step-1")


def test_the_table_names_keys_that_exist():
    dump = saved(recipe_of())
    for key in (*FREE, *UNSAID):
        node = dump
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_techniques_go_by_type_and_in_any_order():
    both = recipe_of(techniques=[TERNARY, SPARSE])
    assert keys(both, recipe_of(techniques=[SPARSE, TERNARY])) == []
    assert keys(both, recipe_of(techniques=[SPARSE])) == ["techniques.ternary"]
    assert keys(recipe_of(), both) == ["techniques.ternary", "techniques.nm_sparsity"]
    assert keys(both, recipe_of(techniques=[{**SPARSE, "group_size": 8}, TERNARY])) == [
        "techniques.nm_sparsity.group_size"
    ]
    teachers = [{"type": "distill", "teacher": name} for name in ("a", "b", "c")]
    assert keys(recipe_of(techniques=teachers[:2]), recipe_of(techniques=teachers[::2])) == [
        "techniques.distill-2.teacher"
    ]


def test_another_kind_is_one_change():
    assert keys(recipe_of(), recipe_of("optimizer={type: lion, lr: 1e-3}")) == ["optimizer.type", "optimizer.betas"]


def test_keys_that_a_checkpoint_lacks_count_at_their_defaults():
    old = saved(recipe_of())
    del old["train"]["max_grad_norm"], old["checkpoint"]["accept_changes"]
    assert changes(old, recipe_of()) == []
    assert [str(change) for change in changes(old, recipe_of("train.max_grad_norm=null"))] == [
        "train.max_grad_norm 1.0 -> null"
    ]


def test_keys_of_another_version_are_changes():
    old = saved(recipe_of())
    old["train"]["forgotten"] = 3
    assert [str(change) for change in changes(old, recipe_of())] == ["train.forgotten 3 -> not set"]


def test_how_a_resume_is_asked_for_is_no_change():
    assert changes(saved(recipe_of()), recipe_of("checkpoint.accept_changes=[optimizer]", "checkpoint.resume=x")) == []


def test_credentials_are_not_shown(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "correct-horse-battery")
    found = changes(saved(recipe_of()), recipe_of("name=correct-horse-battery"))
    assert "correct" not in str(found[0])


@pytest.mark.parametrize(
    ("step", "tokens", "expected"), [(0, 0, 31), (10, 327_680, 31), (10, 655_360, 21), (40, 2**21, 40)]
)
def test_what_is_left_of_a_length_in_tokens(step, tokens, expected):
    assert num_steps(recipe_of(), step=step, tokens=tokens) == expected


def test_a_length_in_steps_stays():
    assert num_steps(recipe_of("train.total_tokens=null", "train.steps=7"), step=3, tokens=12) == 7


def test_a_checkpoint_from_before_frozen_dtype_goes_on_in_fp32():
    recipe = recipe_of()
    before = saved(recipe)
    del before["model"]["frozen_dtype"]
    assert as_meant(before)["model"]["frozen_dtype"] == "fp32"
    assert changes(before, recipe) == []
    resumed = going_on(before, recipe)
    assert resumed.model.frozen_dtype == "fp32"
    assert changes(saved(resumed), recipe) == []  # and the resume after that
    asked = recipe_of("model.frozen_dtype=bf16")
    assert going_on(before, asked) == asked
    assert [str(change) for change in changes(before, asked)] == ["model.frozen_dtype 'fp32' -> 'bf16'"]
    assert going_on(saved(recipe), recipe).model.frozen_dtype == "auto"
