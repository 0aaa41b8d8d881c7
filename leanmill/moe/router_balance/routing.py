"""What a router computes, found out by calling a small copy of it."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError


Affinity = Literal["softmax", "sigmoid"]
"""How logits become scores; sigmoid ones are normalised over experts to be shares (arXiv:2412.19437, eq. 18)."""
_NUM_TOKENS = 16


def affinities(logits: Tensor, affinity: Affinity) -> Tensor:
    """Return each token's share of affinity to each expert, fp32, from logits [T, E]."""
    if affinity == "softmax":
        return logits.float().softmax(-1)
    scores = logits.float().sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def is_routing(output: Any) -> bool:
    """Whether a router's output is (logits [T, E], combine weights [T, K], experts [T, K] int64), maybe with more."""
    if not isinstance(output, tuple) or len(output) < 3 or not all(isinstance(part, Tensor) for part in output[:3]):
        return False
    logits, weights, experts = output[:3]
    is_float = logits.is_floating_point() and weights.is_floating_point() and not experts.is_floating_point()
    return is_float and logits.dim() == 2 and weights.shape == experts.shape and len(weights) == len(logits)


@torch.no_grad()
def routing_of(router: nn.Module, name: str, hidden_size: int) -> tuple[Affinity, int]:
    """Return how a router scores and the number of its experts, from what a copy with random weights returns.

    Args:
        router: On any device, meta too; it stays as it is.
        name: For the message.
        hidden_size: Width of what it takes.

    Raises:
        ConfigError: Its output has another form, or its scores come from neither function.
    """
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(router).to_empty(device="cpu").float()
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / hidden_size**0.5)
    for buffer in twin.buffers():
        buffer.zero_()
    try:
        output = twin(torch.randn(_NUM_TOKENS, hidden_size, generator=generator))
    except (RuntimeError, TypeError, ValueError, IndexError):
        output = None
    found = _affinity(*output[:3]) if is_routing(output) else None
    if found is None:
        raise ConfigError(
            f"router_balance cannot read what the router {name} returns; it knows (logits, combine weights, experts) "
            f"with softmax or sigmoid scores, as of mixtral, qwen3_moe, olmoe and deepseek_v3: choose such a model"
        )
    return found, output[0].shape[-1]


def _affinity(logits: Tensor, weights: Tensor, experts: Tensor) -> Affinity | None:
    """Which function the combine weights are proportional to, within every token."""
    candidates: tuple[Affinity, ...] = ("softmax", "sigmoid")
    for affinity in candidates:
        ratio = weights / affinities(logits, affinity).gather(1, experts)
        # Of one expert a token, only weights that are not normalised tell; all ones may be either.
        reference = ratio[:, :1] if ratio.shape[1] > 1 else ratio[:1]
        if torch.allclose(ratio, reference.expand_as(ratio), rtol=1e-3):
            return affinity
    return "softmax" if experts.shape[1] == 1 and torch.allclose(weights, torch.ones_like(weights)) else None
