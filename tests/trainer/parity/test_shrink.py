"""Recipes whose models are small: the family, its proportions, the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.recipe.root import Recipe
from leanmill.trainer.parity.shrink import layout_of, num_ranks, shrunken, small_mapping


LARGE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 22},
    "qwen3": {"hidden_size": 1024, "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 16},
    "gpt2": {},
    "gemma3_text": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {},
    "deepseek_v3": {"num_hidden_layers": 4},
}


def _recipe(model: dict[str, Any], **sections: Any) -> Recipe:
    return Recipe.model_validate({"model": model, "train": {"total_tokens": 10**6}, **sections})


@pytest.mark.parametrize("family", LARGE)
def test_a_small_model_of_the_family(family: str) -> None:
    model = ModelConfig(config={"model_type": family, **LARGE[family]})
    small = build_on_meta(ModelConfig(config=small_mapping(model)), sequence_length=32)
    assert small.config.model_type == family
    assert sum(p.numel() for p in small.parameters()) < 3_000_000
    kv_heads = getattr(small.config, "num_key_value_heads", 4)
    assert small.config.num_attention_heads % kv_heads == 0


def test_a_checkpoint_is_read_for_its_family_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3", num_hidden_layers=28, vocab_size=151936).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    small = small_mapping(ModelConfig(path=str(tmp_path)))
    assert (small["model_type"], small["num_hidden_layers"], small["vocab_size"]) == ("qwen3", 2, 512)
    with pytest.raises(ConfigError, match=r"not on this machine; download it, or give model\.config"):
        small_mapping(ModelConfig(path="nobody/has-this"))


def test_techniques_and_layout_stay() -> None:
    mixtral = {"config": {"model_type": "mixtral", **LARGE["mixtral"]}}
    techniques = [{"type": "nm_sparsity"}, {"type": "distill", "teacher": "someone/large", "weight": 0.5}]
    recipe = _recipe(mixtral, techniques=techniques, engine="fsdp", layout={"ep": 8, "expert_chunks": 4})
    assert layout_of(recipe.layout) == {"ep": 2, "expert_chunks": 4}
    small = shrunken(recipe, engine={"type": "fsdp"}, world_size=2, teacher="/stand/in")
    assert [one.type for one in small.techniques] == ["nm_sparsity", "distill"]
    assert dict(small.techniques[1].frozen_models()) == {"teacher": "/stand/in"}
    assert (small.layout.ep, small.layout.expert_chunks, small.train.steps) == (2, 4, 3)
    assert shrunken(recipe, engine={"type": "single"}, world_size=1, teacher="/stand/in").layout.ep == 1


def test_replicas_of_shards_need_four_ranks() -> None:
    llama = {"config": {"model_type": "llama"}}
    assert num_ranks(_recipe(llama, engine="fsdp")) == 2
    assert num_ranks(_recipe(llama, engine={"type": "fsdp", "shard_size": 8})) == 4
    assert num_ranks(_recipe(llama, engine="fsdp", layout={"dp_replicate": 4})) == 4


def test_other_data_is_refused() -> None:
    pairs = _recipe(
        {"config": {"model_type": "llama"}},
        data={"task": "preference", "source": {"type": "hf", "path": "x.jsonl"}},
        techniques=[{"type": "dpo"}],
        train={"total_tokens": 10**6, "cross_entropy_weight": 0.0},
    )
    with pytest.raises(ConfigError, match="data.task=preference trains on other ones"):
        shrunken(pairs, engine={"type": "ddp"}, world_size=2, teacher="")
