"""`model.moe`: closed formulas against the built model, the family that is taken, and what none can have."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.counting import num_active_parameters, num_parameters
from leanmill.models.flops import active_matmul_parameters
from leanmill.models.mixture.config import MixtureConfig
from leanmill.models.mixture.families import FAMILIES
from leanmill.models.mixture.translate import Mixture, translate


BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 6}
OF_FAMILY = {"deepseek_v3": LATENT, "deepseek_v2": LATENT}


def section(moe: dict[str, Any], **config: Any) -> ModelConfig:
    return ModelConfig(config=BASE | config, moe=MixtureConfig(**moe))


def mixture_of(moe: dict[str, Any], **config: Any) -> Mixture:
    return translate(MixtureConfig(**moe), BASE | config)


def experts_in(model: Any) -> int:
    """Weights in MLPs and experts of all layers, without routers, gates and coefficients."""
    named = [(name, p) for name, p in model.named_parameters() if ".mlp." in name]
    aside = ("gate.", "shared_expert_gate", "coefficient")
    return sum(p.numel() for name, p in named if not any(part in name for part in aside))


COARSE = {"num_experts": 8, "top_k": 2}
FINE = COARSE | {"granularity": 4}
SHARED = FINE | {"num_shared_experts": 1}


def test_coarse_fine_and_shared_use_equally_many_weights() -> None:
    """DeepSeekMoE, equations 6 to 11: mN - s experts to choose from, mK - s chosen, s shared, all f / m wide."""
    shapes = [mixture_of(moe).shape for moe in (COARSE, FINE, SHARED)]
    assert [(s.num_routed[0], s.top_k, s.num_shared, s.expert_size) for s in shapes] == [
        (8, 2, 0, 48),
        (32, 8, 0, 12),
        (31, 7, 1, 12),
    ]
    assert {s.active_weights for s in shapes} == {3 * 40 * 48 * 2}
    assert {s.expert_weights for s in shapes} == {(3 * 40 * 48 * 8,) * 4}
    assert {mixture_of(moe).family.model_type for moe in (COARSE, FINE, SHARED)} == {"ernie4_5_moe"}
    models = [build_on_meta(section(moe)) for moe in (COARSE, FINE, SHARED)]
    # What differs is the router alone: one row and, in this family, one bias an expert.
    idle_and_router = [
        num_active_parameters(model) - 4 * 41 * s.num_routed[0] for model, s in zip(models, shapes, strict=True)
    ]
    assert len(set(idle_and_router)) == 1
    assert {experts_in(model) for model in models} == {4 * 3 * 40 * 48 * 8}


def test_added_shared_experts_come_on_top() -> None:
    isolated, added = (mixture_of(SHARED | {"shared": shared}).shape for shared in ("isolated", "added"))
    assert (added.num_routed[0], added.top_k, added.num_shared) == (32, 8, 1)
    assert added.active_weights - isolated.active_weights == 3 * 40 * 12


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_formulas_are_those_of_the_built_model(family: Any) -> None:
    """Weights a token uses, in layers with experts, and where those stand, counted on each family's own modules."""
    moe: dict[str, Any] = {"num_experts": 6, "top_k": 2, "granularity": 2}
    moe["num_shared_experts"] = family.min_shared
    if family.placement is not None:
        moe["num_dense_layers"] = 1
        if family.has_steps:
            moe["every_num_layers"] = 2
    if family.has_pyramid:
        moe |= {"num_experts": [4, 6], "residual_expert": True}
    config = section(moe, model_type=family.model_type, **OF_FAMILY.get(family.model_type, {}))
    mixture, model = config.mixture, build_on_meta(config, vocab_size=61)
    assert mixture is not None
    shape = mixture.shape
    found = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert tuple(found) == shape.layers
    counts = [model.model.layers[i].mlp.experts.gate_up_proj.shape[0] for i in found]
    assert tuple(counts) == shape.num_routed
    num_dense = shape.num_layers - len(shape.layers)
    assert experts_in(model) == sum(shape.expert_weights) + num_dense * 3 * 40 * 48
    idle = sum(3 * 40 * shape.expert_size * (n - shape.top_k) for n in shape.num_routed)
    assert num_parameters(model)[0] - num_active_parameters(model) == idle
    assert [s - a for s, a in zip(shape.expert_weights, itertools.repeat(shape.active_weights))] == [
        3 * 40 * shape.expert_size * (n - shape.top_k) for n in shape.num_routed
    ]
    # What multiplies a token: those weights, routers and what mixes with shared or residual experts, attention, head.
    routers = sum(40 * n for n in shape.num_routed)
    mixing = {"pr_moe": 2 * 40, "qwen2_moe": 40}.get(family.model_type, 0) * len(found)
    attention = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n and p.dim() > 1)
    experts = len(found) * shape.active_weights + num_dense * 3 * 40 * 48
    assert active_matmul_parameters(model) == experts + routers + mixing + attention + 61 * 40


@pytest.mark.parametrize(
    ("moe", "family", "why"),
    [
        (COARSE | {"num_dense_layers": 1, "every_num_layers": 3, "num_shared_experts": 1}, None, "router that learns"),
        (SHARED | {"num_dense_layers": 1, "every_num_layers": 3}, "ernie4_5_moe", "all that is asked for"),
        (COARSE | {"top_k": 1}, "qwen3_moe", "router that learns"),
        ({"num_experts": 4, "top_k": 1, "granularity": 2, "num_shared_experts": 1}, "qwen2_moe", "router that learns"),
        ({"num_experts": [4, 8], "top_k": 2}, "pr_moe", "numbers of experts that differ"),
        (COARSE | {"residual_expert": True}, "pr_moe", "residual expert"),
        ({"num_experts": [8, 8], "top_k": 2}, "ernie4_5_moe", "all that is asked for"),
    ],
)
def test_the_first_family_that_has_it_all_is_taken(moe: dict[str, Any], family: str | None, why: str) -> None:
    mixture = mixture_of(moe)
    assert mixture.family.model_type == (family or "qwen2_moe")
    assert why in mixture.why
    assert mixture.family.model_type in mixture.lines()[0]


def test_numbers_of_a_pyramid_are_spread_over_layers_with_experts() -> None:
    shape = mixture_of({"num_experts": [2, 4], "top_k": 1, "num_dense_layers": 1}, num_hidden_layers=5).shape
    assert shape.layers == (1, 2, 3, 4)
    assert shape.num_routed == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("moe", "config", "expected"),
    [
        (COARSE | {"granularity": 5}, {}, r"granularity=5 does not divide .*=48; set model\.moe\.expert_size=45 or 50"),
        (COARSE | {"top_k": 9}, {}, r"top_k=9 is more than num_experts=8; set top_k=8"),
        (COARSE | {"num_shared_experts": 2}, {}, r"leaves nothing to choose .* = 2; set num_shared_experts=1 or less"),
        (COARSE | {"num_dense_layers": 4}, {}, r"leave none of 4 layers"),
        ({"num_experts": [2, 3, 4]}, {}, r"lists 3 numbers for 4 layers .* list 1 or 2 or 4"),
        ({"num_experts": [2, 4], "num_shared_experts": 1, "granularity": 2}, {}, r"no family .* has no .*: set "),
        (SHARED, {"model_type": "mixtral"}, r"no shared experts; set num_shared_experts=0, or .*=ernie4_5_moe"),
        (COARSE, {"model_type": "deepseek_v3"}, r"has no layers without shared experts; set num_shared_experts=1, or"),
        (SHARED | {"every_num_layers": 2}, {"model_type": "glm4_moe"}, r"set every_num_layers=1, or"),
        (COARSE | {"top_k": 1}, {"model_type": "mixtral"}, r"set a larger top_k or granularity, or .*=qwen3_moe"),
        (COARSE | {"top_k": 1}, {"norm_topk_prob": True, "model_type": "olmoe"}, r"norm_topk_prob=true .* remove it"),
        (COARSE, {"model_type": "llama"}, r"'llama' is none that model\.moe builds; remove it, or give one of ernie"),
        (COARSE, {"num_experts": 4}, r"model\.config\.num_experts says what model\.moe says"),
        (COARSE, {"hidden_size": None}, r"model\.config\.hidden_size is missing"),
        (COARSE, {"intermediate_size": 0}, r"model\.config\.intermediate_size is no size"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_that_says_what_can(moe: dict, config: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        mixture_of(moe, **config)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_takes_no_experts() -> None:
    with pytest.raises(ValidationError, match=r"remove model\.moe, or give model\.config"):
        ModelConfig(path="org/name", moe=MixtureConfig(num_experts=4))


def test_plan_and_check_say_which_family_and_how_many_weights() -> None:
    from leanmill.plan.plan import plan
    from leanmill.recipe.explain import explain
    from leanmill.recipe.root import Recipe

    recipe = Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": BASE | {"vocab_size": 260}, "moe": SHARED},
            "data": {"sequence_length": 32, "tokenizer": {"vocab_size": 260}},
            "eval": {"tokens_per_domain": 32},
            "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 64},
            "train": {"steps": 1},
        }
    )
    used = f"{3 * 40 * 12 * 8:,} a layer"
    assert any(used in line for line in plan(recipe).mixture)
    assert used in explain(recipe)
    assert "ernie4_5_moe" in explain(recipe)
    assert plan(recipe).num_active == num_active_parameters(build_on_meta(recipe.model))
    assert recipe == Recipe.model_validate(recipe.model_dump(mode="json"))
