"""The families that `model.moe` can build, and what each cannot have. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from leanmill.models.mixture.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type writes a mixture down; keys are those of its transformers configuration."""

    model_type: str
    words: str
    """Its router and attention, in a few words."""
    num_experts: str
    expert_size: str
    top_k: str = "num_experts_per_tok"
    num_shared: str | None = None
    """None where it has no shared experts."""
    min_shared: int = 0
    shares_a_width: bool = False
    """Whether `num_shared` is the width of all shared experts together."""
    placement: Callable[[Shape], Mapping[str, Any]] | None = None
    """Settings that place dense layers; None where every layer has experts."""
    has_steps: bool = True
    """Whether dense layers may also stand between those with experts."""
    normalises: str | bool = True
    """Whether weights of the chosen experts are made to add up to 1, or the setting that says so."""
    has_pyramid: bool = False
    has_residual: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What it gets where `model.config` says nothing."""

    def lacks(self, shape: Shape) -> Iterator[tuple[str, str]]:
        """Yield (what of the shape it does not have, what to set in `model.moe` instead)."""
        if shape.num_shared and self.num_shared is None:
            yield "shared experts", "num_shared_experts=0"
        if shape.num_shared < self.min_shared:
            yield "layers without shared experts", f"num_shared_experts={self.min_shared}"
        if shape.num_dense_layers and self.placement is None:
            yield "dense first layers", "num_dense_layers=0"
        if shape.every_num_layers > 1 and (self.placement is None or not self.has_steps):
            yield "dense layers between those with experts", "every_num_layers=1"
        if shape.is_pyramid and not self.has_pyramid:
            yield "numbers of experts that differ by layer", "one number as num_experts"
        if shape.has_residual and not self.has_residual:
            yield "residual expert", "residual_expert=false"
        if shape.top_k == 1 and self.normalises is True:
            yield "router that learns with one chosen expert (its weight is always 1)", "a larger top_k or granularity"

    def written(self, shape: Shape) -> dict[str, Any]:
        """Return the settings that say `shape`, of which the family lacks nothing."""
        numbers = list(shape.num_routed) if self.has_pyramid else shape.num_routed[0]
        settings: dict[str, Any] = {self.num_experts: numbers, self.top_k: shape.top_k}
        settings[self.expert_size] = shape.expert_size
        if self.num_shared is not None:
            settings[self.num_shared] = shape.num_shared * (shape.expert_size if self.shares_a_width else 1)
        if self.has_residual:
            settings["residual_expert"] = shape.has_residual
        return settings | dict(self.placement(shape) if self.placement else {})


def _by_lists(shape: Shape) -> dict[str, Any]:
    return {
        "mlp_only_layers": list(range(shape.num_dense_layers)),
        "decoder_sparse_step": shape.every_num_layers,
    }


def _by_start(shape: Shape) -> dict[str, Any]:
    return {
        "moe_layer_start_index": shape.num_dense_layers,
        "moe_layer_end_index": shape.num_layers - 1,
        "moe_layer_interval": shape.every_num_layers,
    }


def _by_first(shape: Shape) -> dict[str, Any]:
    return {"first_k_dense_replace": shape.num_dense_layers}


_ONE_GROUP = {"n_group": 1, "topk_group": 1}

_DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    words="sigmoid router in fp32 with a bias for choosing; multi-head latent attention",
    num_experts="n_routed_experts",
    expert_size="moe_intermediate_size",
    num_shared="n_shared_experts",
    min_shared=1,
    placement=_by_first,
    has_steps=False,
    normalises="norm_topk_prob",
    defaults=_ONE_GROUP,
)

FAMILIES = (
    Family(
        model_type="ernie4_5_moe",
        words="softmax router in fp32, weights of the chosen add up to 1; grouped-query attention",
        num_experts="moe_num_experts",
        top_k="moe_k",
        expert_size="moe_intermediate_size",
        num_shared="moe_num_shared_experts",
        placement=_by_start,
    ),
    Family(
        model_type="qwen3_moe",
        words="softmax router; grouped-query attention with norms of queries and keys",
        num_experts="num_experts",
        expert_size="moe_intermediate_size",
        placement=_by_lists,
        normalises="norm_topk_prob",
    ),
    Family(
        model_type="qwen2_moe",
        words="softmax router, a sigmoid gate on the shared experts; attention with biases",
        num_experts="num_experts",
        expert_size="moe_intermediate_size",
        num_shared="shared_expert_intermediate_size",
        min_shared=1,
        shares_a_width=True,
        placement=_by_lists,
        normalises="norm_topk_prob",
    ),
    Family(
        model_type="pr_moe",
        words="qwen3_moe with numbers of experts by layer and residual experts, Leanmill's own family",
        num_experts="num_experts_by_layer",
        expert_size="moe_intermediate_size",
        placement=_by_lists,
        normalises="norm_topk_prob",
        has_pyramid=True,
        has_residual=True,
    ),
    _DEEPSEEK_V3,
    replace(
        _DEEPSEEK_V3,
        model_type="deepseek_v2",
        words="softmax router, weights as they are; multi-head latent attention",
        normalises=False,
        defaults={},
    ),
    replace(_DEEPSEEK_V3, model_type="glm4_moe", words="deepseek_v3's router; grouped-query attention"),
    replace(
        _DEEPSEEK_V3,
        model_type="dots1",
        words="deepseek_v3's router; grouped-query attention with norms of queries and keys",
    ),
    Family(
        model_type="mixtral",
        words="softmax router, weights of the chosen add up to 1; grouped-query attention",
        num_experts="num_local_experts",
        expert_size="intermediate_size",
    ),
    Family(
        model_type="olmoe",
        words="softmax router; attention with norms of queries and keys",
        num_experts="num_experts",
        expert_size="intermediate_size",
        normalises="norm_topk_prob",
    ),
)
"""In the order in which one is taken: the first that has all that is asked for. The first of all has most of it, so
that a change of one number seldom changes anything else."""
