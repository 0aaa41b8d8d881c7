"""The verbs as functions, from a mapping to an exported folder."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest

import leanmill
from leanmill import api
from leanmill.core.errors import ConfigError
from tests.data.samples import write_texts


def raw(folder):
    write_texts(folder / "a.jsonl", 60)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {"config": {"model_type": "llama", "num_key_value_heads": 1, **sizes}},
        "data": {
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        "train": {"steps": 2, "precision": "fp32"},
        "eval": {"tokens_per_domain": 32},
        "log": {"tensorboard": False, "report": False},
    }


def test_from_a_mapping_to_an_exported_folder(tmp_path):
    given = raw(tmp_path)
    before = json.dumps(given)
    assert api.plan(given).num_parameters > 0
    result = api.train(given, "train.steps=3")
    assert json.dumps(given) == before
    assert (result.status, result.step) == ("finished", 3)
    scores = api.evaluate(result.run_dir).scores
    assert scores["all"].loss == pytest.approx(result.scores["all"].loss, rel=1e-5)
    report = api.export(result.run_dir, tmp_path / "model")
    assert report.max_difference <= report.tolerance
    (tmp_path / "recipe.json").write_text(before)
    exported = api.evaluate(tmp_path / "model", recipe=tmp_path / "recipe.json").scores
    assert exported["all"].loss == pytest.approx(scores["all"].loss, rel=1e-4)


def test_what_is_wrong_is_said_as_on_the_command_line(tmp_path):
    given = raw(tmp_path)
    with pytest.raises(ConfigError, match="train.stepz"):
        api.load_recipe(given, "train.stepz=3")
    recipe = api.load_recipe(given, "train.epochs=1")
    assert (recipe.train.epochs, recipe.train.steps) == (1, None)
    assert api.load_recipe(recipe) is recipe
    assert api.load_recipe(recipe, "seed=4").seed == 4
    with pytest.raises(ConfigError, match="is for Hugging Face folders"):
        api.evaluate(tmp_path / "run", recipe="r.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        api.train(given, "data.source.path=/nowhere/b.jsonl")


def test_verbs_at_the_top_are_the_same():
    assert (leanmill.load_recipe, leanmill.train) == (api.load_recipe, api.train)
    assert {"attach", "fold", "load_recipe", "train"} <= set(dir(leanmill))
    assert all(inspect.ismodule(importlib.import_module(f"leanmill.{name}")) for name in ("plan", "evaluate", "export"))
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        leanmill.tarin  # noqa: B018


def test_importing_it_imports_no_torch():
    code = "import sys, leanmill; leanmill.train, leanmill.load_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
