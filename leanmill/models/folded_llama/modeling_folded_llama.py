"""The family `folded_llama`: Llama whose neighbouring layers share attention and MLP, each with norms of its own.

With `adapter_rank` each layer also adds a matrix of low rank to every weight that it shares: a Relaxed Recursive
Transformer (Bae et al. 2024, arXiv:2410.20672), h = W' x + B A x.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_folded_llama import FoldedLlamaConfig


class FoldedLlamaAdapter(nn.Module):
    """What one layer adds to a weight that several share: up down x + bias.

    No linear layers, so that techniques that take all of them leave these alone.

    Args:
        shared: The layer's projection, whose weight is shared.
        rank: Of the product, at most.
    """

    def __init__(self, shared: nn.Linear, rank: int) -> None:
        super().__init__()
        rank = min(rank, shared.in_features, shared.out_features)
        self.down = nn.Parameter(torch.empty(rank, shared.in_features))
        self.up = nn.Parameter(torch.empty(shared.out_features, rank))
        self.bias = None if shared.bias is None else nn.Parameter(torch.empty(shared.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in]."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)


def _projected(shared: nn.Module, name: str, x: Tensor, own: nn.ModuleDict | None) -> Tensor:
    """What the projection `name` of `shared` makes of x in a layer that adds `own`."""
    out: Tensor = getattr(shared, name)(x)
    return out if own is None else out + own[name](x)


class FoldedLlamaAttention(Qwen3Attention):
    """Qwen3's, or Llama's, which is that without norms, and what a layer adds to it."""

    def __init__(self, config: FoldedLlamaConfig, layer_idx: int, *, has_norms: bool) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        if not has_norms:
            self.q_norm = self.k_norm = nn.Identity()  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        own: nn.ModuleDict | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [B, S, H], and weights of attention where they are asked for; `own` is of the layer."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        norms = own if own is not None and "q_norm" in own else {"q_norm": self.q_norm, "k_norm": self.k_norm}
        query, key, value = (
            _projected(self, f"{name}_proj", hidden_states, own).view(shape) for name in ("q", "k", "v")
        )
        query, key = norms["q_norm"](query).transpose(1, 2), norms["k_norm"](key).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return _projected(self, "o_proj", out.reshape(*shape[:-2], -1).contiguous(), own), weights


class FoldedLlamaMLP(LlamaMLP):
    """Llama's, and what a layer adds to it."""

    def forward(self, x: Tensor, own: nn.ModuleDict | None = None) -> Tensor:
        """Return [B, S, H] of x [B, S, H]; `own` is of the layer."""
        gate, up = _projected(self, "gate_proj", x, own), _projected(self, "up_proj", x, own)
        return _projected(self, "down_proj", self.act_fn(gate) * up, own)


class _CacheOfLayer:
    """What one layer of a block sees of the key-value cache: a place of its own."""

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key_states, value_states, self._layer_idx, *args, **kwargs)


class FoldedLlamaBlock(GradientCheckpointingLayer):
    """Several layers, x -> x + attention(norm(x)), then x + mlp(norm(x)), that differ in norms and adapters alone.

    It is called once a forward, so what gathers, recomputes or calibrates blocks does so for its layers together.
    """

    def __init__(self, config: FoldedLlamaConfig, block_idx: int) -> None:
        super().__init__()
        layers = config.num_layers_by_block or []
        self.hidden_size = config.hidden_size
        self.first_layer = sum(layers[:block_idx])
        is_relaxed = config.adapter_rank > 0 and layers[block_idx] > 1
        self.self_attn = FoldedLlamaAttention(config, self.first_layer, has_norms=config.qk_norm and not is_relaxed)
        self.mlp = FoldedLlamaMLP(config)
        self.input_layernorm = _norms(config, layers[block_idx])
        self.post_attention_layernorm = _norms(config, layers[block_idx])
        if is_relaxed:
            self.own = nn.ModuleList([self._own(config) for _ in range(layers[block_idx])])

    def _own(self, config: FoldedLlamaConfig) -> nn.ModuleDict:
        """What a layer has of its own beside norms before attention and MLP."""
        shared = [*self.self_attn.named_children(), *self.mlp.named_children()]
        own = {
            name: FoldedLlamaAdapter(module, config.adapter_rank)
            for name, module in shared
            if isinstance(module, nn.Linear)
        }
        norms = ("q_norm", "k_norm") if config.qk_norm else ()
        return nn.ModuleDict(own | {name: LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps) for name in norms})

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return hidden states [B, S, H]."""
        cache = kwargs.pop("past_key_values", None)
        norms = zip(self.input_layernorm, self.post_attention_layernorm, strict=True)
        for use, (before_attention, before_mlp) in enumerate(norms):
            own = {"own": self.own[use]} if hasattr(self, "own") else {}
            attended, _ = self.self_attn(
                hidden_states=before_attention(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=None if cache is None else _CacheOfLayer(cache, self.first_layer + use),
                **own,
                **kwargs,
            )
            hidden_states = hidden_states + attended
            hidden_states = hidden_states + self.mlp(before_mlp(hidden_states), **own)
        return hidden_states


def _norms(config: FoldedLlamaConfig, number: int) -> nn.ModuleList:
    return nn.ModuleList([LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(number)])


class FoldedLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the body and the causal LM share."""

    config_class = FoldedLlamaConfig
    _no_split_modules = ["FoldedLlamaBlock"]
    _can_record_outputs = {"hidden_states": FoldedLlamaBlock, "attentions": FoldedLlamaAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FoldedLlamaAdapter):
            init.normal_(module.down, std=self.config.initializer_range)
            init.zeros_(module.up)
            if module.bias is not None:
                init.zeros_(module.bias)


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
