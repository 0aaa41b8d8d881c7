"""Experts that choose their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.moe.router.capacity import Over
from leanmill.moe.routing.decision import Option, Routing
from leanmill.moe.routing.policy import Policy, affinities


class ExpertChoice(Option):
    """Each expert takes the ceil(T experts_a_token / E) of T tokens with the largest affinity to it.

    Zhou et al. 2022, arXiv:2202.09368: S = shares [T, E], the choice is the top of each column, and S there the
    combine weight, times the router's scaling. Loads are equal without a loss. A token is taken by few experts or
    many; of more than `at_most`, by those of its largest shares (the paper's capped variants solve for the best
    choice under the cap). Causal language models see the future through it: whether an expert takes a token
    depends on the tokens after it.

    Args:
        policy: Of the router.
        experts_a_token: How many on average, at most E.
        at_most: How many one token has at most.
        over: Which tokens an expert chooses from.
    """

    key = "expert_choice"
    changes_inference = True

    def __init__(self, policy: Policy, experts_a_token: float, at_most: int, over: Over) -> None:
        super().__init__()
        self.policy, self.experts_a_token, self.at_most, self.over = policy, experts_a_token, at_most, over

    def on_routing(self, routing: Routing) -> Routing:
        num_parts = len(routing.counts) if self.over == "sequence" else 1
        shares = affinities(routing.logits, self.policy.score)
        is_taken = taken(shares.detach(), routing.token_mask, self.experts_a_token, num_parts)
        best = torch.where(is_taken, shares.detach(), -1).sort(dim=-1, descending=True, stable=True)
        values, experts = best.values[:, : self.at_most], best.indices[:, : self.at_most]
        weights = shares.gather(1, experts).masked_fill(values < 0, 0) * self.policy.scaling
        experts = experts.masked_fill(values < 0, self.policy.num_experts)
        each = torch.arange(self.policy.num_experts, device=experts.device)
        counts = (experts.unsqueeze(-1) == each).sum(1).reshape(len(routing.counts), -1, len(each)).sum(1)
        return routing._replace(weights=weights, experts=experts, counts=counts)


def taken(shares: Tensor, token_mask: Tensor | None, experts_a_token: float, num_parts: int) -> Tensor:
    """Return which tokens each expert takes, bool [T, E]; earlier ones where shares are equal.

    Args:
        shares: [T, E], not negative.
        token_mask: bool [T], False for tokens that nobody takes.
        experts_a_token: See `ExpertChoice`.
        num_parts: Equal parts of neighbouring tokens that are chosen from one by one.
    """
    num_tokens, num_experts = shares.shape
    if token_mask is None:
        token_mask = torch.ones(num_tokens, dtype=torch.bool, device=shares.device)
    is_real = token_mask.view(num_parts, -1, 1)
    room = (is_real.sum(1, keepdim=True) * experts_a_token / num_experts).ceil()
    order = shares.view(num_parts, -1, num_experts).masked_fill(~is_real, -1).sort(dim=1, descending=True, stable=True)
    place = torch.arange(order.indices.shape[1], device=shares.device).view(1, -1, 1).expand_as(order.indices)
    ranks = torch.empty_like(order.indices).scatter_(1, order.indices, place)
    return ((ranks < room) & is_real).reshape(num_tokens, num_experts)
