"""Noise on what a router sees."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.noise import Noise, uniform
from leanmill.moe.routing.decision import Option
from leanmill.moe.routing.tokens import Tokens


class Jitter(Option):
    """Multiplies each element of the router's input by a number of [1 - width, 1 + width), in training.

    As in Switch (Fedus et al. 2021, arXiv:2101.03961, 2.4), for the router alone: experts see the input as it was,
    where Mixtral's own in transformers changes it for them, in place. A number depends on seed, step, row of the
    data and place in it: recomputation draws the same, and so does any number of ranks.

    Args:
        name: Of the router; what it draws depends on it.
        width: Above 0, below 1.
    """

    key = "jitter"

    def __init__(self, name: str, width: float) -> None:
        super().__init__()
        self.width, self.noise = width, Noise(f"router_jitter/{name}")

    def on_hidden(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        if not self.training:
            return hidden
        if tokens.row_ids is None or len(hidden) % len(tokens.row_ids):
            raise RunError("router.jitter draws by row of the data, and was not told which rows a batch has")
        rows, length = tokens.row_ids, len(hidden) // len(tokens.row_ids)
        place = torch.arange(length * hidden.shape[1], device=hidden.device)
        drawn = uniform(self.noise.key, (rows.unsqueeze(-1) * len(place) + place).reshape(hidden.shape))
        return hidden * (1 + self.width * (2 * drawn - 1)).to(hidden.dtype)
