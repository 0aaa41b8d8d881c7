"""A recipe whose model is small: the same family, techniques, engine and layout, in seconds on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from leanmill.core.errors import ConfigError
from leanmill.models.config import ModelConfig
from leanmill.models.mapping import mapped_config, mapping_of
from leanmill.models.pretrained import pretrained_config
from leanmill.parallel.config import LayoutConfig
from leanmill.recipe.on_this_machine import local_model
from leanmill.recipe.root import Recipe


SEQUENCE_LENGTH, NUM_ROWS, NUM_STEPS, NUM_MICRO_BATCHES, MAX_NORM, EPS = 32, 12, 3, 3, 0.1, 1e-3
"""Rows of a step make equal micro-batches of 1, 2 or 4 ranks; every step is clipped; an `eps` that keeps Adam from
turning rounding of gradients near zero into steps."""
_NUM_LAYERS, _NUM_HEADS, _HEAD_DIM, _VOCAB_SIZE = 2, 4, 32, 512
_HIDDEN_SIZE = _NUM_HEADS * _HEAD_DIM
"""A multiple of the groups that quantisers and masks have."""
_AT_MOST: dict[str, int] = {
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": _HIDDEN_SIZE,
    "num_hidden_layers": _NUM_LAYERS,
    "num_attention_heads": _NUM_HEADS,
    "head_dim": _HEAD_DIM,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "sliding_window": 16,
}
"""By the names that transformers' families share; what is smaller already stays."""
_TEXT_TASKS = ("pretrain", "sft", "masked")


def shrunken(recipe: Recipe, *, engine: Mapping[str, Any], world_size: int, teacher: str) -> Recipe:
    """Return the recipe with a small model, for a few steps on drawn rows.

    Args:
        recipe: One that trains, without phases.
        engine: The engine section to train with; on one process its layout goes too.
        world_size: Ranks it will run on.
        teacher: Folder that stands in for every model beside its own.

    Raises:
        ConfigError: It trains on other things than rows of tokens, its model is not on this machine, or the family or a
            technique does not take such sizes.
    """
    if recipe.data.task not in _TEXT_TASKS or recipe.model.task == "embedding":
        raise ConfigError(
            f"check --parity draws rows of tokens, and data.task={recipe.data.task} trains on other ones; check a "
            f"recipe with data.task=pretrain or sft and the same engine and layout"
        )
    if recipe.layout.low_comm is not None:
        raise ConfigError(
            "layout.low_comm has workers step without each other, which no one process does; add layout.low_comm=null "
            "to hold what each worker does beside one process"
        )
    layout = layout_of(recipe.layout) if world_size > 1 else {}
    data_size = world_size // (layout.get("tp", 1) * layout.get("cp", 1))
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    raw = recipe.model_dump(mode="json", exclude={"phases"})
    raw |= {
        "device": "cpu",
        "model": _small_model(recipe.model),
        "techniques": _with_stand_in(recipe, teacher),
        "engine": dict(engine),
        "layout": layout,
        "schedule": {"type": "constant", "warmup_steps": 0},
        "batch": {
            "tokens_per_step": tokens,
            "tokens_per_micro_batch": tokens // (data_size * NUM_MICRO_BATCHES),
        },
    }
    raw["data"] = {"sequence_length": SEQUENCE_LENGTH, "task": recipe.data.task}
    raw["train"] |= {
        "steps": NUM_STEPS,
        "epochs": None,
        "total_tokens": None,
        "precision": "fp32",
        "max_grad_norm": None if recipe.train.max_grad_norm is None else MAX_NORM,
        "compile": False,
        "non_finite": "stop",
        "spike": None,
    }
    raw["eval"], raw["checkpoint"] = {}, {}
    if "eps" in raw["optimizer"]:
        raw["optimizer"]["eps"] = max(raw["optimizer"]["eps"], EPS)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"the recipe with a small model is no recipe: {' '.join(str(error).split())}") from None


def small_mapping(model: ModelConfig) -> dict[str, Any]:
    """Return `model.config` of a small model of the same family.

    Raises:
        ConfigError: The model is not on this machine.
    """
    here = local_model(model)
    if here is None:
        raise ConfigError(
            f"check --parity builds a small model of the family of {model.path}, whose configuration is not on this "
            f"machine; download it, or give model.config with its model_type and model.path=null"
        )
    mapping = here.family_config
    hf_config = pretrained_config(here) if mapping is None else mapped_config(mapping, None, here.task)
    found = mapping_of(hf_config) if mapping is None else copy.deepcopy(mapping)

    def named(key: str) -> str:
        return hf_config.attribute_map.get(key, key)  # type: ignore[no-any-return]

    layers, heads = hf_config.num_hidden_layers, hf_config.num_attention_heads
    for key, most in _AT_MOST.items():
        value = getattr(hf_config, key, None)
        if isinstance(value, int) and value > most and key not in found:
            found[named(key)] = most
        elif isinstance(found.get(named(key)), int):
            found[named(key)] = min(found[named(key)], most)
    if "head_dim" in found and hasattr(hf_config, "qk_rope_head_dim"):  # by which latent attention means this one
        found["head_dim"] = _AT_MOST["qk_rope_head_dim"]
    kv_heads = getattr(hf_config, "num_key_value_heads", None)
    if isinstance(kv_heads, int):
        most = _NUM_HEADS if kv_heads == heads else _NUM_HEADS // 2
        found[named("num_key_value_heads")] = min(kv_heads, most)
    for key, value in found.items():
        if isinstance(value, list) and len(value) == layers:  # one entry a layer: the first, and the last
            found[key] = [value[0], value[-1]][: min(layers, _NUM_LAYERS)]
    return {key: value for key, value in found.items() if not key.endswith("_token_id")}


def layout_of(layout: LayoutConfig) -> dict[str, Any]:
    """Return the same layout with each of its sizes 2."""
    raw = layout.model_dump(mode="json", exclude_defaults=True)
    sizes = {"ep", "tp", "cp", "pp", "dp_shard", "dp_replicate"} & raw.keys()
    return raw | {key: min(raw[key], 2) for key in sizes if raw[key] is not None}


def num_ranks(recipe: Recipe) -> int:
    """Return the fewest ranks on which such a layout is what it is: 2, or 4 where two of its sizes are above 1."""
    layout = recipe.layout
    is_hybrid = getattr(recipe.engine, "shard_size", None) is not None or layout.dp_shard is not None
    is_hybrid |= (layout.dp_replicate or 1) > 1 and recipe.engine.type in ("fsdp", "auto")
    sizes = [is_hybrid, *(getattr(layout, name, 1) > 1 for name in ("tp", "cp"))]
    return 4 if sum(sizes) > 1 or is_hybrid else 2


def _small_model(model: ModelConfig) -> dict[str, Any]:
    raw = model.model_dump(mode="json")
    kept = {key: raw[key] for key in ("task", "attention", "frozen_dtype")}
    return kept | {"config": small_mapping(model)}


def _with_stand_in(recipe: Recipe, teacher: str) -> list[dict[str, Any]]:
    techniques = []
    for technique in recipe.techniques:
        paths = {*technique.frozen_models().values(), *technique.read_models().values()}

        def replaced(value: Any, paths: set[str] = paths) -> Any:
            if isinstance(value, dict):
                return {key: replaced(one) for key, one in value.items()}
            if isinstance(value, list):
                return [replaced(one) for one in value]
            return teacher if isinstance(value, str) and value in paths else value

        techniques.append(replaced(technique.model_dump(mode="json")))
    return techniques
