"""Configuration of the family `folded_llama`. Imports nothing of Leanmill, so that it can travel with its weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class FoldedLlamaConfig(LlamaConfig):
    """Llama, Mistral, Qwen2 or Qwen3 of which neighbouring layers share the weights of attention and MLP.

    `num_hidden_layers` counts layers as a token meets them; the model has fewer blocks than that.
    """

    model_type = "folded_llama"
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]

    num_layers_by_block: list[int] | None = None
    """How many layers, one after another, each block is; None is one each."""
    qk_norm: bool = False
    """Whether queries and keys of a head are normalised, as in Qwen3; layers without adapters share these norms too."""
    adapter_rank: int = 0
    """Rank of what each layer of a block adds to the weights that it shares (Bae et al. 2024, arXiv:2410.20672), or a
    matrix's smaller side where that is less; 0 is nothing."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        layers = self.num_layers_by_block or [1] * self.num_hidden_layers
        if min(layers) < 1 or sum(layers) != self.num_hidden_layers:
            raise ValueError(
                f"num_layers_by_block={layers} is to be numbers of at least 1 that add up to "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if self.adapter_rank < 0:
            raise ValueError(f"adapter_rank={self.adapter_rank} is to be at least 0")
        self.num_layers_by_block = list(layers)

    def validate_architecture(self) -> None:
        """Heads of size `head_dim` need not fill the hidden size."""
