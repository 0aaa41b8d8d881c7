"""The family `latent_llama`: Llama whose keys are rotary in part, the rest of them and the values from one latent.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from .configuration_latent_llama import LatentLlamaConfig


class LatentLlamaAttention(nn.Module):
    """Attention whose cache is the rotary part of each key and a latent that all heads share."""

    def __init__(self, config: LatentLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        assert config.rotary_frequencies is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.rope_dim = config.head_dim, config.rope_head_dim
        self.groups = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // self.groups
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        half = self.head_dim // 2
        self.rotary = [[*kept, *(half + number for number in kept)] for kept in config.rotary_frequencies[layer_idx]]
        """Of each key-value head, which columns of the tables its rotary part takes."""
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_rope_proj = nn.Linear(hidden, self.groups * self.rope_dim, bias=bias)
        self.kv_down_proj = nn.Linear(hidden, config.kv_lora_rank, bias=False)
        self.k_up_proj = nn.Linear(config.kv_lora_rank, self.groups * (self.head_dim - self.rope_dim), bias=bias)
        self.v_up_proj = nn.Linear(config.kv_lora_rank, self.groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [B, S, H], and attention maps where the implementation has them.

        Of each head's queries and keys the first `rope_head_dim` numbers are rotary.

        Args:
            hidden_states: [B, S, H].
            position_embeddings: Cosines and sines [B, S, head_dim].
            attention_mask: As the implementation of attention takes it.
            past_key_values: Keeps the latent [B, 1, K, rank] and the rotary keys [B, groups, K, rope_head_dim].
            kwargs: For the implementation of attention.
        """
        batch, length = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        rotary_key = self.k_rope_proj(hidden_states).view(batch, length, -1, self.rope_dim).transpose(1, 2)
        latent = self.kv_down_proj(hidden_states)[:, None]
        # The stream need not be waited for: the copy is staged before this returns.
        columns = torch.tensor(self.rotary, device="cpu").to(hidden_states.device, non_blocking=True)
        # Each key-value head's columns of tables [B, S, head_dim], as [B, groups, S, rope_head_dim].
        cos, sin = (table[..., columns].transpose(1, 2) for table in position_embeddings)
        rotary_key = rotary_key * cos + rotate_half(rotary_key) * sin
        if past_key_values is not None:
            latent, rotary_key = past_key_values.update(latent, rotary_key, self.layer_idx)
        cos, sin = (table.repeat_interleave(self.num_key_value_groups, dim=1) for table in (cos, sin))
        rotary_query, query = query.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        query = torch.cat([rotary_query * cos + rotate_half(rotary_query) * sin, query], dim=-1)
        key, value = (self._spread(projection, latent) for projection in (self.k_up_proj, self.v_up_proj))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, maps = attend(
            self,
            query,
            torch.cat([rotary_key, key], dim=-1),
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(batch, length, -1).contiguous()), maps

    def _spread(self, projection: nn.Module, latent: Tensor) -> Tensor:
        """What a latent [B, 1, K, rank] holds of each key-value head [B, groups, K, n]."""
        spread: Tensor = projection(latent[:, 0])
        return spread.unflatten(-1, (self.groups, -1)).transpose(1, 2)


class LatentLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's, with that attention."""

    def __init__(self, config: LatentLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = LatentLlamaAttention(config, layer_idx)  # type: ignore[assignment]


class LatentLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the body and the causal LM share."""

    config_class = LatentLlamaConfig
    _no_split_modules = ["LatentLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": LatentLlamaDecoderLayer, "attentions": LatentLlamaAttention}


class LatentLlamaModel(LatentLlamaPreTrainedModel, LlamaModel):
    """The body."""

    def __init__(self, config: LatentLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LatentLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LatentLlamaForCausalLM(LatentLlamaPreTrainedModel, LlamaForCausalLM):
    """The body and its head."""

    _tp_plan = None  # type: ignore[assignment]
    _pp_plan = None  # type: ignore[assignment]

    def __init__(self, config: LatentLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LatentLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["LatentLlamaForCausalLM", "LatentLlamaModel", "LatentLlamaPreTrainedModel"]
