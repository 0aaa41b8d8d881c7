"""Configuration of the family `latent_llama`. Imports nothing of Leanmill, so that it can travel with its weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class LatentLlamaConfig(LlamaConfig):
    """Llama, Mistral or Qwen2 of whose keys a few frequencies are rotary, the rest and the values coming from a latent.

    Ji et al. 2025, arXiv:2502.14837.
    """

    model_type = "latent_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # a latent is not split by heads
    base_model_pp_plan = None  # type: ignore[assignment]

    kv_lora_rank: int = 64
    """Numbers of the latent, a token and layer."""
    rope_head_dim: int = 16
    """Numbers of a key that are rotary, two for each frequency."""
    rotary_frequencies: list[list[list[int]]] | None = None
    """Which of the head_dim / 2 frequencies each key-value head keeps [layers, key-value heads, rope_head_dim / 2],
    ascending; None is the first, the highest, everywhere."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        half, number = self.rope_head_dim // 2, self.head_dim // 2  # type: ignore[operator]
        if self.rope_head_dim % 2 or not 0 < half < number or self.kv_lora_rank < 1:
            raise ValueError(
                f"rope_head_dim={self.rope_head_dim} is to be even and below head_dim={self.head_dim}, "
                f"kv_lora_rank={self.kv_lora_rank} at least 1"
            )
        heads = self.num_key_value_heads
        if self.rotary_frequencies is None:
            self.rotary_frequencies = [[list(range(half))] * heads] * self.num_hidden_layers  # type: ignore[operator]
        kept = [one for layer in self.rotary_frequencies for one in layer]
        counts = {len(layer) for layer in self.rotary_frequencies}
        if (
            len(self.rotary_frequencies) != self.num_hidden_layers
            or counts != {heads}
            or any(len(set(one)) != half or not 0 <= min(one) <= max(one) < number for one in kept)
        ):
            raise ValueError(
                f"rotary_frequencies are to be {half} of {number} for each of {heads} key-value heads of "
                f"{self.num_hidden_layers} layers"
            )

    def validate_architecture(self) -> None:
        """Heads of size `head_dim` need not fill the hidden size."""
