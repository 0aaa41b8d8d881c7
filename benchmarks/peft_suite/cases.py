"""What PEFT's own tests are given of our tuners: a row of options for each way a tuner may be set up."""

from __future__ import annotations

from typing import Any


TUNERS: dict[str, dict[str, dict[str, Any]]] = {
    "core_lora": {
        "lora_xs": {"r": 2, "variant": "lora_xs", "alpha": 16.0},
        "lora_sb": {"r": 2, "variant": "lora_sb", "alpha": 1.0},
        "moslora": {"r": 2, "variant": "moslora", "alpha": 1.0},
        "nlora": {"r": 2, "variant": "nlora", "alpha": 0.02},
        "int_tune": {"r": 2, "variant": "int_tune", "alpha": 1.0},
    },
    "mos": {
        "shards": {"r": 4, "pool_rank": 2, "num_shards": 2},
        "whole": {"r": 2, "pool_rank": 2, "num_shards": 1, "private_rank": 2},
    },
    "nola": {"basis": {"r": 2, "num_basis": 8, "alpha": 0.5}},
    "moe_lora": {
        "experts": {"r": 2, "num_experts": 3, "top_k": 1, "alpha": 8.0},
        "ranks": {"r": 1, "num_experts": 6, "top_k": 2, "alpha": 1.0, "balance": "bias"},
    },
    "rank_lora": {
        "earned": {"r": 4, "target_r": 3.0, "init_r": 2, "alpha": 1.0},
        "nested": {"r": 4, "variant": "dylora", "used_r": 3, "alpha": 1.0},
    },
    "bottleneck": {
        "series": {"r": 2, "alpha": 2.0, "placement": "series"},
        "parallel": {"r": 2, "alpha": 2.0, "placement": "parallel"},
    },
}
"""Name of the method -> name of a set-up -> options. Strengths suit the tests' fixed rates and inputs of up to 90."""

_IDENTITY = ("test_disable_adapters", "test_disable_adapters_with_merging")
_WHOLE = (
    "test_set_requires_grad",
    "test_loading_model_requires_grad_set_correctly",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
    "test_training*_layer_indexing",
    "test_training*_gradient_checkpointing",
)
_OF_A_HUB = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")
DEPARTURES: tuple[tuple[str, set[str | None], tuple[str, ...], str], ...] = (
    ("core_lora", {"lora_xs"}, _IDENTITY, "it starts 1e-5 away from the base, as its paper says"),
    (
        "core_lora",
        {"lora_sb"},
        (*_IDENTITY, "test_only_params_are_updated"),
        "it is zero and has no gradient until it is started from the gradient of a batch",
    ),
    (
        "core_lora",
        {"lora_xs", "lora_sb", "int_tune", None},
        _WHOLE,
        "it trains the core alone, and the test asks that every tensor of an adapter trains",
    ),
    (
        "mos",
        {"shards", "whole"},
        ("test_training*_layer_indexing",),
        "its layers share a pool a type, and the test counts names of parameters",
    ),
    *((name, {None}, _OF_A_HUB, "the test asks a model hub for another method's adapter") for name in TUNERS),
)
"""(method, set-ups, None for the defaults of the class; patterns of tests that ask what it does not do; why)."""

UNMERGEABLE = {
    "bottleneck": "it is no matrix and cannot be merged",
    "moe_lora": "experts that each token chooses are no matrix and cannot be merged",
}
"""Tuners that cannot be merged, and why: PEFT's tests ask by class, and merge no further where one cannot."""

LAYERS: dict[str, dict[str, Any]] = {
    "1": {"target_modules": "lin0"},
    "2": {"target_modules": ["lin0"]},
    "3": {"target_modules": ["lin0", "lin1"]},
    "4": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}
"""Layers of PEFT's `MLP` that are wrapped, as rows of other methods choose them."""

SAME_AND_DIFFERENT = {"Same": ("lin0", "lin0"), "Different": ("lin0", "lin1")}
"""Where two adapters at a time stand."""
STRONGER: dict[str, dict[str, Any]] = {"core_lora": {"alpha": 16.0}}
"""What is different there and on whole models: outputs of two adapters have to be 1e-3 apart."""
