"""How many copies of tokens an expert takes at most, and which it drops."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leanmill.moe.routing.decision import Option, Routing
from leanmill.moe.routing.policy import Score, affinities


Drop = Literal["probability", "position"]
Over = Literal["sequence", "micro_batch"]


class Capacity(Option):
    """Lets each expert take ceil(factor K T / E) copies of T tokens, in training.

    Args:
        factor: 1 is room for equal loads.
        drop: `probability` drops those of least affinity, `position` the last ones; ties drop the later one.
        over: Which tokens share the room: those of a sequence, or of a rank's micro-batch.
        score: Of the router.
    """

    key = "capacity_factor"

    def __init__(self, factor: float, drop: Drop, over: Over, score: Score) -> None:
        super().__init__()
        self.factor, self.drop, self.over, self.score = factor, drop, over, score

    def on_routing(self, routing: Routing) -> Routing:
        """Drop what has no room: `is_kept`, and weights of 0. Weights of a token's other copies stay as they are."""
        if not self.training:
            return routing
        num_parts = len(routing.counts) if self.over == "sequence" else 1
        priority = None
        if self.drop == "probability":
            shares = affinities(routing.logits.detach(), self.score)
            priority = shares.gather(1, routing.experts.clamp(max=shares.shape[1] - 1))
        room = self.factor * routing.counts.view(num_parts, -1).sum(-1) / routing.counts.shape[1]
        is_kept = kept(routing.experts, routing.counts.shape[1], priority, room.ceil().clamp(min=1))
        return routing._replace(is_kept=is_kept, weights=routing.weights.masked_fill(~is_kept, 0))


def kept(experts: Tensor, num_experts: int, priority: Tensor | None, room: Tensor) -> Tensor:
    """Return which copies have room at their experts, bool [T, K]; all of places that are left empty.

    Args:
        experts: [T, K] int64, `num_experts` in empty places.
        num_experts: E.
        priority: [T, K], the largest are kept; None keeps the first.
        room: [P], copies that each expert takes of each of P equal parts of neighbouring tokens.
    """
    num_tokens, top_k = experts.shape
    length = num_tokens // len(room) or 1
    part = torch.arange(num_tokens, device=experts.device).div(length, rounding_mode="floor").unsqueeze(-1)
    # One queue for each expert and part, in the order of priority; sorts are stable.
    queue = (part * (num_experts + 1) + experts).flatten()
    order = torch.arange(len(queue), device=queue.device)
    if priority is not None:
        order = priority.flatten().sort(descending=True, stable=True).indices
    order = order[queue[order].sort(stable=True).indices]
    in_line = queue[order]
    place = torch.arange(len(queue), device=queue.device) - torch.searchsorted(in_line, in_line)
    has_room = place < room.repeat_interleave(length)[order.div(top_k, rounding_mode="floor")]
    return torch.zeros_like(has_room).scatter_(0, order, has_room).view(num_tokens, top_k) | (experts == num_experts)
