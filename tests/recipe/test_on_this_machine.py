"""What checking leaves to training."""

from __future__ import annotations

import importlib.util

import pytest

from leanmill.recipe.on_this_machine import not_looked_at
from leanmill.recipe.root import Recipe
from tests.models.families import tiny_config


@pytest.mark.parametrize(
    ("changes", "package", "extra"),
    [
        ({"engine": {"type": "deepspeed", "stage": 2}}, "deepspeed", "deepspeed"),
        ({"log": {"wandb": True}}, "wandb", "wandb"),
        ({"checkpoint": {"remote": "s3://bucket/runs"}}, "s3fs", "s3"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_pip_line(changes, package, extra, monkeypatch):
    recipe = Recipe.model_validate(
        {
            "name": "one",
            "model": {"config": tiny_config("llama", vocab_size=300)},
            "data": {"sequence_length": 32, "tokenizer": {"vocab_size": 300}},
            "train": {"steps": 1},
            **changes,
        }
    )
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    assert not any("package" in line for line in not_looked_at(recipe))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there)
    (line,) = (line for line in not_looked_at(recipe) if "package" in line)
    assert line == f"the package {package}, which is not on this machine: pip install 'leanmill[{extra}]' where it runs"
