"""From the hidden states of a text's tokens to the one vector that stands for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pooling:
    """How a model's hidden states are made one vector."""

    kind: Literal["mean", "cls"] = "mean"
    """Their mean over tokens, or that of the first token."""
    normalise: bool = False
    """Whether the vector is brought to length 1."""

    def __call__(self, hidden: Tensor, is_token: Tensor) -> Tensor:
        """Return the vectors of texts, fp32 [N, H].

        Args:
            hidden: [N, S, H], any float dtype.
            is_token: bool [N, S]; a text without tokens becomes zeros.
        """
        states = hidden.float()
        if self.kind == "cls":
            found = states[:, 0] * is_token[:, :1]
        else:
            found = (states * is_token[..., None]).sum(1) / is_token.sum(1, keepdim=True).clamp(min=1)
        if not self.normalise:
            return found
        return found / found.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()
