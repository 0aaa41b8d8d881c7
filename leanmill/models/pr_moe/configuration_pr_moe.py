"""Configuration of the family `pr_moe`. Imports nothing of Leanmill, so that it can travel with its weights."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig


class PrMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE whose layers may have different numbers of experts, and a residual expert.

    Rajbhandari et al. 2022, arXiv:2201.05596.
    """

    model_type = "pr_moe"

    num_experts_by_layer: list[int] | None = None
    """Of the layers with experts, in order; None is `num_experts` in each. `num_experts` becomes the largest."""
    residual_expert: bool = False
    """Whether an MLP of `intermediate_size` stands beside the experts of a layer."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        layers, counts = self.layers_with_experts, self.num_experts_by_layer
        if counts is None:
            counts = [self.num_experts] * len(layers)
        if len(counts) != len(layers):
            raise ValueError(f"num_experts_by_layer has {len(counts)} numbers for {len(layers)} layers with experts")
        self.num_experts_by_layer, self.num_experts = counts, max(counts, default=0)
        if self.output_router_logits and len(set(counts)) > 1:
            raise ValueError("output_router_logits adds up loads over layers, whose numbers of experts differ")

    def num_experts_in(self, layer: int) -> int:
        """Experts of a layer by its index; 0 where its MLP is dense."""
        return dict(zip(self.layers_with_experts, self.num_experts_by_layer or (), strict=True)).get(layer, 0)

    @property
    def layers_with_experts(self) -> list[int]:
        """Indices of the layers with experts."""
        step, dense = self.decoder_sparse_step, self.mlp_only_layers or []
        return [index for index in range(self.num_hidden_layers) if (index + 1) % step == 0 and index not in dense]
