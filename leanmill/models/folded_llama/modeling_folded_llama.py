"""The family `folded_llama`: Llama whose neighbouring layers share attention and MLP, each with norms of its own.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_folded_llama import FoldedLlamaConfig


class FoldedLlamaAttention(Qwen3Attention):
    """Qwen3's, or Llama's, which is that without norms."""

    def __init__(self, config: FoldedLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        if not config.qk_norm:
            self.q_norm = self.k_norm = nn.Identity()  # type: ignore[assignment]


class _CacheOfLayer:
    """What one layer of a block sees of the key-value cache: a place of its own."""

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key_states, value_states, self._layer_idx, *args, **kwargs)


class FoldedLlamaBlock(GradientCheckpointingLayer):
    """Several layers, x -> x + attention(norm(x)), then x + mlp(norm(x)), that differ in their norms alone.

    It is called once a forward, so what gathers, recomputes or calibrates blocks does so for its layers together.
    """

    def __init__(self, config: FoldedLlamaConfig, block_idx: int) -> None:
        super().__init__()
        layers = config.num_layers_by_block or []
        self.hidden_size = config.hidden_size
        self.first_layer = sum(layers[:block_idx])
        self.self_attn = FoldedLlamaAttention(config, self.first_layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = _norms(config, layers[block_idx])
        self.post_attention_layernorm = _norms(config, layers[block_idx])

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return hidden states [B, S, H]."""
        cache = kwargs.pop("past_key_values", None)
        norms = zip(self.input_layernorm, self.post_attention_layernorm, strict=True)
        for layer, (before_attention, before_mlp) in enumerate(norms, self.first_layer):
            attended, _ = self.self_attn(
                hidden_states=before_attention(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=None if cache is None else _CacheOfLayer(cache, layer),
                **kwargs,
            )
            hidden_states = hidden_states + attended
            hidden_states = hidden_states + self.mlp(before_mlp(hidden_states))
        return hidden_states


def _norms(config: FoldedLlamaConfig, number: int) -> nn.ModuleList:
    return nn.ModuleList([LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(number)])


class FoldedLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the body and the causal LM share."""

    config_class = FoldedLlamaConfig
    _no_split_modules = ["FoldedLlamaBlock"]
    _can_record_outputs = {"hidden_states": FoldedLlamaBlock, "attentions": FoldedLlamaAttention}


class FoldedLlamaModel(FoldedLlamaPreTrainedModel, LlamaModel):
    """The body. Of hidden states it records those behind blocks."""

    def __init__(self, config: FoldedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        num_blocks = len(config.num_layers_by_block or [])
        self.layers = nn.ModuleList([FoldedLlamaBlock(config, index) for index in range(num_blocks)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class FoldedLlamaForCausalLM(FoldedLlamaPreTrainedModel, LlamaForCausalLM):
    """The body and its head."""

    _tp_plan = None  # type: ignore[assignment]
    _pp_plan = None  # type: ignore[assignment]

    def __init__(self, config: FoldedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = FoldedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["FoldedLlamaForCausalLM", "FoldedLlamaModel", "FoldedLlamaPreTrainedModel"]
