"""The family `pruned_llama`: Llama with layers of their own sizes, weights in pairs, and rotations in sliced models.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

import copy
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

from .configuration_pruned_llama import PrunedLlamaConfig


class PrunedLlamaAttention(Qwen3Attention):
    """Attention with as many heads as its layer has: Qwen3's, or Llama's, which is that without norms."""

    def __init__(self, config: PrunedLlamaConfig, layer_idx: int) -> None:
        heads, groups = config.num_attention_heads_by_layer or [], config.num_key_value_heads_by_layer or []
        own = copy.copy(config)
        own.num_attention_heads, own.num_key_value_heads = heads[layer_idx], groups[layer_idx]
        # Counted among the layers with attention: a key-value cache asks its first layer for its length.
        super().__init__(own, sum(number > 0 for number in heads[:layer_idx]))  # type: ignore[arg-type]
        self.config = config  # type: ignore[assignment]  # where the model's choice of a function is written
        if not config.qk_norm:
            self.q_norm = self.k_norm = nn.Identity()  # type: ignore[assignment]


class PrunedLlamaPair(nn.Module):
    """A linear layer whose weight is a product: up down x + bias."""

    def __init__(self, whole: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(whole.in_features, rank, bias=False)
        self.up = nn.Linear(rank, whole.out_features, bias=whole.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in]."""
        return self.up(self.down(x))  # type: ignore[no-any-return]


class PrunedLlamaDecoderLayer(GradientCheckpointingLayer):
    """x -> x R_a + attention(norm(x)), then x R_m + mlp(norm(x)), each half where the layer has it, or a matrix."""

    def __init__(self, config: PrunedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        has_attention = (config.num_attention_heads_by_layer or [])[layer_idx] > 0
        num_neurons = (config.intermediate_size_by_layer or [])[layer_idx]
        linear_attention = any((config.linear_attention_by_layer or [])[layer_idx : layer_idx + 1])
        linear_mlp = any((config.linear_mlp_by_layer or [])[layer_idx : layer_idx + 1])
        if has_attention:
            self.self_attn = PrunedLlamaAttention(config, layer_idx)
        if linear_attention:
            self.attention_linear = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        if has_attention or linear_attention:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if num_neurons:
            own = copy.copy(config)
            own.intermediate_size = num_neurons
            self.mlp = LlamaMLP(own)
        if linear_mlp:
            self.mlp_linear = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)
        if num_neurons or linear_mlp:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.residual_rotations:
            self.attention_rotation = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.mlp_rotation = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        for name, ranks in (config.rank_by_linear or {}).items():
            if ranks[layer_idx]:
                part, _, leaf = name.rpartition(".")
                owner = self.get_submodule(part)
                setattr(owner, leaf, PrunedLlamaPair(getattr(owner, leaf), ranks[layer_idx]))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return hidden states [B, S, H]."""
        residual = self.attention_rotation(hidden_states) if hasattr(self, "attention_rotation") else hidden_states
        if hasattr(self, "self_attn"):
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
            residual = residual + attended
        if hasattr(self, "attention_linear"):
            residual = residual + self.attention_linear(self.input_layernorm(hidden_states))
        hidden_states = residual
        if hasattr(self, "mlp_rotation"):
            residual = self.mlp_rotation(residual)
        if hasattr(self, "mlp"):
            residual = residual + self.mlp(self.post_attention_layernorm(hidden_states))
        if hasattr(self, "mlp_linear"):
            residual = residual + self.mlp_linear(self.post_attention_layernorm(hidden_states))
        return residual


class PrunedLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the body and the causal LM share."""

    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": PrunedLlamaDecoderLayer, "attentions": PrunedLlamaAttention}


class PrunedLlamaModel(PrunedLlamaPreTrainedModel, LlamaModel):
    """The body."""

    def __init__(self, config: PrunedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [PrunedLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(PrunedLlamaPreTrainedModel, LlamaForCausalLM):
    """The body and its head."""

    _tp_plan = None  # type: ignore[assignment]
    _pp_plan = None  # type: ignore[assignment]

    def __init__(self, config: PrunedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["PrunedLlamaForCausalLM", "PrunedLlamaModel", "PrunedLlamaPreTrainedModel"]
