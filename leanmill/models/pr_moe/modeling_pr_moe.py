"""The family `pr_moe`: Qwen3-MoE with a pyramid of experts and residual experts.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_pr_moe import PrMoeConfig


class PrMoeCoefficient(nn.Module):
    """How much experts and residual MLP count for a token: softmax(W x + b), fp32 [..., 2]."""

    def __init__(self, config: PrMoeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias).softmax(-1, dtype=torch.float32)


class PrMoeSparseMoeBlock(Qwen3MoeSparseMoeBlock):
    """Experts, and where `residual_expert` is set c0 x experts(x) + c1 x mlp(x).

    The reference (`deepspeed/moe/layer.py`) takes the softmax in the model's dtype; here it is in fp32.
    """

    def __init__(self, config: PrMoeConfig, num_experts: int) -> None:
        own = copy.copy(config)
        own.num_experts = num_experts
        super().__init__(own)
        self.experts.config = config  # type: ignore[assignment]  # where the model's choice of experts' compute is written
        if config.residual_expert:
            self.mlp = Qwen3MoeMLP(config, intermediate_size=config.intermediate_size)
            self.coefficient = PrMoeCoefficient(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden_states)
        if not hasattr(self, "coefficient"):
            return output
        chosen, residual = self.coefficient(hidden_states).to(output.dtype).split(1, dim=-1)
        return output * chosen + self.mlp(hidden_states) * residual


class PrMoeDecoderLayer(Qwen3MoeDecoderLayer):
    """A block with as many experts as its layer has."""

    def __init__(self, config: PrMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        num_experts = config.num_experts_in(layer_idx)
        if num_experts:
            self.mlp = PrMoeSparseMoeBlock(config, num_experts)


class PrMoePreTrainedModel(Qwen3MoePreTrainedModel):
    """What the body and the causal LM share."""

    config_class = PrMoeConfig
    _no_split_modules = ["PrMoeDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Qwen3MoeTopKRouter, index=0),
        "hidden_states": PrMoeDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrMoeCoefficient):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)


class PrMoeModel(PrMoePreTrainedModel, Qwen3MoeModel):
    """The body."""

    def __init__(self, config: PrMoeConfig) -> None:
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([PrMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrMoeForCausalLM(PrMoePreTrainedModel, Qwen3MoeForCausalLM):
    """The body and its head."""

    def __init__(self, config: PrMoeConfig) -> None:
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.model = PrMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


__all__ = ["PrMoeForCausalLM", "PrMoeModel", "PrMoePreTrainedModel"]
