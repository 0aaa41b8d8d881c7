"""The family `linear_llama`: Llama whose attention is softmax in a window and linear behind it.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_linear_llama import LinearLlamaConfig
from .hybrid_attention import hybrid_attention, in_fp32, summed_state


_FIRST_FACTOR = math.log(0.1 / 0.9)
"""Whose sigmoid is 0.1, as the authors' code begins."""


class LinearLlamaFeatureMap(nn.Module):
    """Hedgehog's features (Zhang et al. 2024, arXiv:2402.04347): softmax of x W and of -x W, a matrix W a head.

    Args:
        config: Of the model.
    """

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim, config.feature_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, heads, S, 2 x feature_dim] fp32 of x [B, heads, S, head_dim]."""
        return _features(x, self.weight)


@in_fp32
def _features(x: Tensor, weight: Tensor) -> Tensor:
    mapped = x.float() @ weight.float()
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)


class LinearLlamaAttention(Qwen3Attention):
    """Qwen3's attention, or Llama's, which is that without norms, with `hybrid_attention` in the place of softmax."""

    def __init__(self, config: LinearLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        if not config.qk_norm:
            self.q_norm = self.k_norm = nn.Identity()  # type: ignore[assignment]
        self.feature_map_q = LinearLlamaFeatureMap(config)
        self.feature_map_k = LinearLlamaFeatureMap(config)
        self.window_factor = nn.Parameter(torch.full((config.num_attention_heads,), _FIRST_FACTOR))
        self.window = config.sliding_window

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return hidden states [B, S, H].

        Args:
            hidden_states: [B, S, H].
            position_embeddings: Cosines and sines [B, S, head_dim].
            attention_mask: Which tokens are there, those of the cache first [B, at least K]; None is all.
            past_key_values: A window of keys and values, and a state.
            position_ids: Without a cache, documents begin where these do not go up by one [B or 1, S].
            kwargs: Of no use here.
        """
        batch, length = hidden_states.shape[:-1]
        shape = (batch, length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        state = None
        if past_key_values is not None:
            state = past_key_values.layers[self.layer_idx].recurrent_states[0]  # type: ignore[union-attr]
            key, value = past_key_values.update(key, value, self.layer_idx)
            position_ids = None
        documents = _documents(batch, key.shape[2], attention_mask, position_ids, key.device)
        key, value = (repeat_kv(tensor, self.num_key_value_groups) for tensor in (key, value))
        key_features = self.feature_map_k(key)
        out = hybrid_attention(
            query,
            key,
            value,
            self.feature_map_q(query),
            key_features,
            self.window_factor.float().sigmoid(),
            documents,
            window=self.window,
            scaling=self.scaling,
            state=state,
        )
        if past_key_values is not None:
            self._leave_window(past_key_values, key_features, value, documents, state)
        return self.o_proj(out.to(hidden_states.dtype).transpose(1, 2).reshape(batch, length, -1)), None

    def _leave_window(
        self, cache: Cache, key_features: Tensor, value: Tensor, documents: Tensor, state: Tensor | None
    ) -> None:
        """Take the tokens that the cache keeps no longer into the state."""
        leaving = max(key_features.shape[2] - self.window + 1, 0)
        gone = summed_state(key_features[:, :, :leaving], value[:, :, :leaving], documents[:, :leaving] >= 0)
        cache.update_recurrent_state(gone if state is None else state + gone, self.layer_idx)


def _documents(
    batch: int, length: int, attention_mask: Tensor | None, position_ids: Tensor | None, device: torch.device
) -> Tensor:
    """Which document each of the last tokens belongs to [B, K], -1 where there is none."""
    if position_ids is None:
        found = torch.zeros(batch, length, dtype=torch.long, device=device)
    else:
        found = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1).expand(batch, -1)
    if attention_mask is None:
        return found
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; linear attention takes which tokens there are, "
            f"[B, S]"
        )
    return found.masked_fill(~attention_mask[:, -length:].bool(), -1)


class LinearLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's, with that attention."""

    def __init__(self, config: LinearLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = LinearLlamaAttention(config, layer_idx)  # type: ignore[assignment]


class LinearLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the body and the causal LM share."""

    config_class = LinearLlamaConfig
    _no_split_modules = ["LinearLlamaDecoderLayer"]
    _is_stateful = True  # a state cannot be rolled back
    _can_record_outputs = {"hidden_states": LinearLlamaDecoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearLlamaFeatureMap):
            init.kaiming_uniform_(module.weight)
        if isinstance(module, LinearLlamaAttention):
            init.constant_(module.window_factor, _FIRST_FACTOR)


class LinearLlamaModel(LinearLlamaPreTrainedModel, LlamaModel):
    """The body."""

    def __init__(self, config: LinearLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LinearLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states; Llama's forward, without the masks [S, S] that its attention needs."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + seen
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class LinearLlamaForCausalLM(LinearLlamaPreTrainedModel, LlamaForCausalLM):
    """The body and its head."""

    _tp_plan = None  # type: ignore[assignment]
    _pp_plan = None  # type: ignore[assignment]

    def __init__(self, config: LinearLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LinearLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["LinearLlamaForCausalLM", "LinearLlamaModel", "LinearLlamaPreTrainedModel"]
