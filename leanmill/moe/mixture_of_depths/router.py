"""The router of a block: a score for every token, and what the block's work on it counts."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.around import Around, Call, Ring


Weighing = Literal["softmax", "tanh"]
_EPSILON = 1e-6


class Scores(NamedTuple):
    """What a router says of tokens [B, S], in fp32 or wider."""

    logits: Tensor
    """[B, S, 2] (skip, run) of `softmax`; [B, S] of `tanh`."""
    priority: Tensor
    """Higher ones are chosen first; at least 0 where `softmax` rather runs than skips."""
    weight: Tensor
    """What the block's work counts."""


class DepthRouter(nn.Module):
    """One linear map of a token, in fp32 whatever the precision of the run.

    - `softmax` (gamma-MoD): two logits of the token divided by its root mean square; the weight is the second
      one's probability. The learned scale of the norm that the paper's code puts before it is part of the weights.
    - `tanh` (p-MoD, TanhNorm): one logit with bias of the token as it is; the weight is 1 + scale x tanh(logit).
      All start at zero: the block begins as it was.

    Args:
        hidden_size: Width of a token.
        weighing: Which of the two.
        scale: Of `tanh`.
    """

    def __init__(self, hidden_size: int, weighing: Weighing, scale: float = 0.2) -> None:
        super().__init__()
        self.weighing: Weighing = weighing
        self.scale = scale
        num_logits = 2 if weighing == "softmax" else 1
        self.weight = nn.Parameter(torch.empty(num_logits, hidden_size))
        self.bias = nn.Parameter(torch.empty(1)) if weighing == "tanh" else None

    def reset_parameters(self) -> None:
        """Draw the weights of `softmax` (Xavier); set those of `tanh` to zero."""
        if self.bias is None:
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Scores:
        """Score tokens [B, S, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            if self.bias is None:
                rows = rows * (rows.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
                logits = F.linear(rows, self.weight.to(rows.dtype))
                priority = logits[..., 1] - logits[..., 0]
                return Scores(logits, priority, priority.sigmoid())
            logits = F.linear(rows, self.weight.to(rows.dtype), self.bias.to(rows.dtype)).squeeze(-1)
            return Scores(logits, logits, 1 + self.scale * logits.tanh())


class SharedRouter(Around):
    """Holds the router that all blocks share, around the body: the weights of blocks are apart from each other."""

    technique = "mixture_of_depths"
    ring = Ring.TAP

    def __init__(self, router: DepthRouter) -> None:
        super().__init__()
        self.router = router

    def reset_parameters(self) -> None:
        self.router.reset_parameters()

    def forward(self, call: Call, /, *args: object, **kwargs: object) -> object:
        """Run the body."""
        return call(*args, **kwargs)
