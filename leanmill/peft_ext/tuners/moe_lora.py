"""Token-routed LoRA experts as a PEFT method: several LoRAs a layer, of which each token takes a few.

    y = W x + s sum_{e in top K of h + b} g_e(x) B_e A_e x,   g = score(h), h = W_r x, s = alpha / r

with E experts A_e [r, in], B_e [out, r], a router W_r [E, in] of every layer's own and a bias b [E] that only chooses.
LLaVA-MoLE (Chen et al. 2024, arXiv:2401.16160) is K = 1, softmax and a loss that keeps loads equal; SMoRA (Zhao et al.
2025, arXiv:2501.15103) is r = 1, every rank an expert, and biases that do. Since a set of LoRAs is one LoRA of rank E r
whose ranks are switched in blocks, both are one computation: A x for all ranks, times each token's gates, times B.

A router's decisions are made in the router's module, so that a trainer may stand around it: balance is the trainer's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.topk_router.op import topk_router
from leanmill.moe.routing.policy import Policy
from leanmill.moe.routing.projection import project
from leanmill.peft_ext.tuners.additive import AdditiveConfig, AdditiveModel, UnmergeableLayer


_ALLOWED = {"score": ("softmax", "sigmoid"), "balance": ("loss", "bias", "none")}


@dataclass
class MoeLoraConfig(AdditiveConfig):
    """Configuration of token-routed LoRA experts; `r` is the rank of each.

    Raises:
        ValueError: A value is out of range.
    """

    num_experts: int = field(default=4, metadata={"help": "LoRAs of each layer."})
    top_k: int = field(default=1, metadata={"help": "How many of them a token takes."})
    score: Literal["softmax", "sigmoid"] = field(
        default="softmax", metadata={"help": "How a router's logits become gates."}
    )
    normalise: bool = field(default=False, metadata={"help": "Let the gates of a token's choice sum to one."})
    balance: Literal["loss", "bias", "none"] = field(
        default="loss",
        metadata={"help": "How Leanmill keeps experts equally loaded: a loss, biases that only choose, not at all."},
    )
    balance_weight: float = field(default=0.01, metadata={"help": "Weight of the loss, a mean over layers."})
    bias_rate: float = field(default=1e-3, metadata={"help": "By how much biases move in a step."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOE_LORA")
        self.check_least(num_experts=2, top_k=1)
        for key, allowed in _ALLOWED.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        for key, balance in (("balance_weight", "loss"), ("bias_rate", "bias")):
            value = getattr(self, key)
            if not 0 < value < math.inf:
                raise ValueError(f"{key} must be above 0 and finite, got {value!r}; for none set balance: none")
            if self.balance != balance and value != type(self).__dataclass_fields__[key].default:
                raise ValueError(f"{key}={value} is read with balance={balance} alone, and balance={self.balance}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        if self.normalise and self.top_k == 1:
            raise ValueError("normalise=True with top_k=1 makes every gate 1, so that no router learns; set top_k=2")

    @property
    def policy(self) -> Policy:
        """What routers make of their logits."""
        bias = "choice_bias" if self.balance == "bias" else None
        return Policy(self.num_experts, self.top_k, self.score, normalise=self.normalise, bias=bias)


class ExpertRouter(nn.Module):
    """Chooses LoRA experts for each token.

    Args:
        policy: How.
        num_in: Width of tokens.
    """

    choice_bias: Tensor
    """fp32 [E], where loads are balanced by biases: added to scores for the choice only."""

    def __init__(self, policy: Policy, num_in: int) -> None:
        super().__init__()
        self.policy = policy
        self.weight = nn.Parameter(torch.empty(policy.num_experts, num_in))
        nn.init.uniform_(self.weight, -(num_in**-0.5), num_in**-0.5)  # as nn.Linear's
        if policy.bias is not None:
            self.register_buffer("choice_bias", torch.zeros(policy.num_experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [T, E] and gates [T, K], fp32, and experts [T, K] int64, for `tokens` [T, in]."""
        policy = self.policy
        logits = project(tokens, self.weight)
        bias = policy.bias_of(self, ())
        routed = topk_router(logits, policy.top_k, score=policy.score, normalise=policy.normalise, bias=bias)
        return logits, routed.weights, routed.experts


class MoeLoraLayer(UnmergeableLayer):
    """A linear layer with token-routed LoRA experts."""

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", "moe_lora_router")
    other_param_names = ("rank", "scaling", "dropouts")
    why_no_matrix = "experts that each token chooses are no one matrix"

    def make_containers(self) -> None:
        self.rank: dict[str, int] = {}
        """Of each expert."""
        self.scaling: dict[str, float] = {}
        self.moe_lora_A, self.moe_lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.moe_lora_router = nn.ModuleDict()

    def make_adapter(self, adapter_name: str, config: MoeLoraConfig, **kwargs: Any) -> None:
        self.rank[adapter_name], self.scaling[adapter_name] = config.r, config.alpha / config.r
        all_ranks = config.num_experts * config.r
        a, b = torch.empty(all_ranks, self.in_features), torch.zeros(self.out_features, all_ranks)
        nn.init.uniform_(a, -(self.in_features**-0.5), self.in_features**-0.5)  # Kaiming-uniform with a = sqrt(5)
        if not config.init_weights:
            nn.init.normal_(b, std=0.1)
        self.moe_lora_A[adapter_name], self.moe_lora_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)
        self.moe_lora_router[adapter_name] = ExpertRouter(config.policy, self.in_features)

    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        gates = self.gates(adapter, tokens.flatten(0, -2)).repeat_interleave(self.rank[adapter], -1)
        inner = F.linear(tokens, self.moe_lora_A[adapter])
        inner = inner * gates.view(inner.shape).to(inner.dtype)
        return self.scaling[adapter] * F.linear(inner, self.moe_lora_B[adapter])

    def gates(self, adapter: str, tokens: Tensor) -> Tensor:
        """Return what each expert is multiplied with, fp32 [T, E], 0 where it is not chosen, for `tokens` [T, in]."""
        logits, weights, experts = self.moe_lora_router[adapter](tokens)
        # Expert E is nobody: the place of a token that is padding.
        spread = weights.new_zeros(len(tokens), logits.shape[-1] + 1).scatter(1, experts, weights)
        return spread[:, :-1]

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


class MoeLoraModel(AdditiveModel):
    """PEFT's tuner of token-routed LoRA experts."""

    prefix: str = "moe_lora_"
    tuner_layer_cls = MoeLoraLayer


Config, Model = MoeLoraConfig, MoeLoraModel
