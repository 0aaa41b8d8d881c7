"""What a search suggests is legal, fits, is sorted, and says why the others lost."""

import json

import pytest
import yaml

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.parallel.config import LayoutConfig
from leanmill.parallel.layout import resolve_layout
from leanmill.plan.layouts.candidates import SHARED
from leanmill.plan.layouts.rates import DEVICES, as_yaml, read_rates, with_given
from leanmill.plan.layouts.search import as_yaml as typed
from leanmill.plan.layouts.search import search
from leanmill.plan.plan import plan
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step


RAW = {
    "device": "cpu",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 4096,
        }
    },
    "data": {"sequence_length": 32, "tokenizer": {"vocab_size": 4096}},
    "batch": {"tokens_per_step": 256, "tokens_per_micro_batch": 32},
    "train": {"steps": 10, "precision": "bf16"},
    "eval": {"tokens_per_domain": 64},
}


@pytest.fixture(scope="module")
def recipe():
    return Recipe.model_validate(RAW)


@pytest.fixture(scope="module")
def found(recipe):
    return search(recipe, 4, 2, rates=DEVICES["h100"], rank_memory_gib=80)


def test_everything_that_is_suggested_is_a_recipe_that_these_ranks_run(found):
    shared = set()
    for one in found.ranked:
        pasted = yaml.safe_load(typed(one.candidate, found.recipe))
        again = Recipe.model_validate(RAW | {key: {**RAW.get(key, {}), **value} for key, value in pasted.items()})
        layout = resolve_layout(again.layout, again.engine, 4)
        assert layout == one.candidate.layout
        assert micro_batches_of_step(again, layout.data_size) == one.candidate.num_micro_batches
        shared |= {key for key in SHARED if getattr(again.layout, key, 1) > 1}
    assert {"tp", "cp"} <= shared <= set(SHARED) <= set(LayoutConfig.model_fields)


def test_stages_of_a_pipeline_are_not_alike_and_not_suggested():
    piped = {"engine": "ddp", "layout": {"pp": 2, "pp_split": [0, 1]}}
    found = search(Recipe.model_validate(RAW | piped), 2, 2, rates=DEVICES["h100"], rank_memory_gib=80)
    assert {one.candidate.recipe.layout.pp for one in found.ranked} == {1}
    assert not any("layout.pp" in reason for reason in found.refused)


def test_the_peak_is_the_plans_own(found):
    for one in found.ranked[:3]:
        assert plan(one.candidate.recipe, 4, 2).peak_bytes == one.peak_bytes


def test_the_best_is_as_fast_as_any_and_the_others_say_why_not(found):
    seconds = [one.time.seconds for one in found.ranked[1:]]
    assert seconds == sorted(seconds)
    assert found.best.time.seconds <= 1.01 * min(one.time.seconds for one in found.ranked)
    assert not found.best.reason
    assert all(one.reason for one in found.ranked[1:])
    assert any("has not been shown" in reason or "not for DeepSpeed" in reason for reason in found.refused)


def test_what_does_not_fit_never_wins(recipe, found):
    peaks = sorted(one.peak_bytes for one in found.ranked)
    limit = peaks[len(peaks) // 2]
    less = search(recipe, 4, 2, rates=DEVICES["h100"], rank_memory_gib=(limit + 1) / 2**30)
    assert less.best.peak_bytes <= limit + 1
    assert any(one.reason.startswith("memory") for one in less.ranked)
    with pytest.raises(ConfigError, match="nothing fits"):
        search(recipe, 4, 2, rates=DEVICES["h100"], rank_memory_gib=0.0001)


def test_a_slow_link_between_machines_is_the_reason(recipe):
    slow = with_given(DEVICES["h100"], matmul_tflops=None, link_gb=None, node_link_gb=0.01)
    found = search(recipe, 4, 2, rates=slow, rank_memory_gib=80)
    assert any(one.reason.startswith("links between") for one in found.ranked)
    # What crosses machines least wins: gradients once, rather than weights in every micro-batch.
    assert found.best.time.bytes_between < 1.01 * min(one.time.bytes_between for one in found.ranked)


def test_rates_survive_their_file_and_an_unknown_device_is_named(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text(as_yaml(DEVICES["a100"]))
    assert read_rates(str(path)) == DEVICES["a100"]
    with pytest.raises(ConfigError, match="did you mean h100"):
        read_rates("h10")


def test_the_command_prints_yaml_to_paste(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RAW))
    assert main(["plan", str(path), "--search", "--gpus-per-node", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(document["best_yaml"])["engine"]["type"] in ("ddp", "fsdp", "deepspeed")
    assert main(["plan", str(path), "--search", "--gpus-per-node", "2", "--show", "2"]) == 0
    told = capsys.readouterr().out
    assert "paste into the recipe" in told
    assert document["best_yaml"].splitlines()[0] in told
