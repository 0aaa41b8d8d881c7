import os

import pytest

from leanmill.core.errors import ConfigError
from leanmill.recipe.root import Recipe
from leanmill.trainer import verdicts
from leanmill.trainer.trial import try_model
from tests.models.families import tiny_config


def recipe(**changes):
    sections = {
        "model": {"config": tiny_config("llama", vocab_size=300)},
        "data": {"sequence_length": 32, "tokenizer": {"vocab_size": 300}},
        "batch": {"tokens_per_micro_batch": 64, "tokens_per_step": 64},
        "train": {"steps": 1},
        "device": "cpu",
    }
    return Recipe.model_validate(sections | changes)


@pytest.mark.parametrize(
    "techniques",
    [
        [],
        [{"type": "lora", "rank": 32}, {"type": "ternary"}, {"type": "nm_sparsity"}],
        [{"type": "lora", "rank": 4, "where": "branch"}],
        [{"type": "distill", "teacher": "some/where"}],
    ],
)
def test_what_would_start_passes(techniques):
    try_model(recipe(techniques=techniques))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"techniques": [{"type": "lora", "rank": 33}]}, "set rank: 32 or less"),
        ({"techniques": [{"type": "lora", "rank": 33, "targets": ["k_proj"]}]}, "set rank: 16 or less"),
        ({"techniques": [{"type": "ternary"}, {"type": "lsq"}]}, "QUANT"),
        ({"techniques": [{"type": "nm_sparsity", "group_size": 7, "num_kept": 2}]}, "does not divide"),
        ({"techniques": [{"type": "lora", "targets": ["nothing"]}]}, "nothing"),
        ({"techniques": [{"type": "lora", "targets": []}]}, r"targets=\[\] takes no weight"),
        ({"techniques": [{"type": "lora", "targets": ["q_proj"], "exclude": ["q_proj"]}]}, "remove patterns"),
        ({"data": {"sequence_length": 32, "tokenizer": {"vocab_size": 301}}}, "at least 301"),
        ({"model": {"config": tiny_config("llama", vocab_size=300), "attention": "flash"}}, "attention"),
    ],
)
def test_what_would_not_start_is_refused(changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        try_model(recipe(**changes))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_verdict_is_of_this_model_and_this_code(cache, monkeypatch):
    first = recipe()
    assert not verdicts.is_known_good(first)
    verdicts.remember(first)
    assert verdicts.is_known_good(first)
    assert verdicts.is_known_good(recipe(train={"steps": 9}, name="other"))
    assert not verdicts.is_known_good(recipe(techniques=[{"type": "ternary"}]))
    monkeypatch.setattr(verdicts, "_version", lambda name: "another")
    assert not verdicts.is_known_good(first)


def test_a_changed_file_of_the_package_is_another_code(cache, tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr("leanmill.__file__", str(tmp_path / "__init__.py"))
    verdicts.remember(recipe())
    assert verdicts.is_known_good(recipe())
    os.utime(tmp_path / "__init__.py", ns=(0, 0))
    assert not verdicts.is_known_good(recipe())


def test_a_cache_that_cannot_be_written_and_a_checkpoint_are_not_remembered(cache, tmp_path):
    checkpoint = recipe(model={"path": str(tmp_path)})
    verdicts.remember(checkpoint)
    assert not verdicts.is_known_good(checkpoint)
    cache.write_text("a file in the way")
    verdicts.remember(recipe())
    assert not verdicts.is_known_good(recipe())
