"""Configuration of the family `linear_llama`. Imports nothing of Leanmill, so that it can travel with its weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class LinearLlamaConfig(LlamaConfig):
    """Llama, Mistral, Qwen2 or Qwen3 whose attention is softmax in a window and linear behind it.

    Zhang et al. 2024, arXiv:2410.10254.
    """

    model_type = "linear_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # maps of features are not split by heads
    base_model_pp_plan = None  # type: ignore[assignment]

    sliding_window: int = 64
    """Tokens that are attended to by softmax, a token itself among them; at least 2."""
    feature_dim: int = 64
    """Columns of a head's map of features, each of which gives two features."""
    qk_norm: bool = False
    """Whether queries and keys of a head are normalised, as in Qwen3."""
    layer_types: list[str] | None = None
    """What the cache of each layer is: a window of keys and values, and a state; written by itself."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.sliding_window < 2 or self.feature_dim < 1:
            raise ValueError(
                f"sliding_window={self.sliding_window} is to be at least 2, feature_dim={self.feature_dim} at least 1"
            )
        if self.attention_dropout:
            raise ValueError(f"attention_dropout={self.attention_dropout}: linear attention has no maps to drop out of")
        self.layer_types = ["hybrid_sliding"] * self.num_hidden_layers

    def validate_architecture(self) -> None:
        """Heads of size `head_dim` need not fill the hidden size."""
