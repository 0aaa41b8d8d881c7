"""How early routing is learned: whether two checkpoints send the same tokens to the same experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmill.study.routed import Ids


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Of the experts that one checkpoint chose for a token, the share that the other chose as well."""

    share: float
    """Mean over tokens; 1 where both route alike."""
    by_chance: float
    """What two routers of these loads would share that know nothing of each other."""


def overlap(one: Ids, other: Ids, num_experts: int) -> Overlap:
    """Compare the experts of the same tokens under two checkpoints, in one layer.

    Args:
        one: [N, K] chosen experts, `num_experts` where a choice was dropped.
        other: The same of the other checkpoint.
        num_experts: E.
    """
    first, second = _sent(one, num_experts), _sent(other, num_experts)
    chosen = max(int(first.sum()), 1)
    return Overlap(
        share=float((first & second).sum() / chosen),
        by_chance=float((first.mean(0) * second.mean(0)).sum() * len(first) / chosen),
    )


def _sent(experts: Ids, num_experts: int) -> NDArray[np.bool_]:
    """[N, E]: whether a token goes to an expert."""
    sent = np.zeros((len(experts), num_experts + 1), dtype=np.bool_)
    sent[np.arange(len(experts))[:, None], experts] = True
    return sent[:, :-1]
