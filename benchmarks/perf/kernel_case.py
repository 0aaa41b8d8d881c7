"""What a kernel is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch


F = TypeVar("F", bound=Callable[..., object])


def compiled(definition: F) -> F:
    """Return a function of a `naive.py` under torch.compile, for fixed shapes."""
    return torch.compile(definition, dynamic=False)  # type: ignore[return-value]


@dataclass(frozen=True)
class Case:
    """A ratio of times: ours / peer, to stay at or below `limit`."""

    name: str
    ours: Callable[[], object]
    """One whole measured call."""
    peer: Callable[[], object]
    peer_name: str
    limit: float
    conditions: str
    """Shapes, dtypes and what a call covers."""
    rounds: int = 15
    definition: Callable[[], object] | None = None
    """One call of the naive definition under torch.compile: the second peer of every operation in C."""


@dataclass(frozen=True)
class MemoryCase:
    """A ratio of bytes: ours / peer, to stay at or below `limit`."""

    name: str
    ours_bytes: Callable[[], int]
    peer_bytes: Callable[[], int]
    peer_name: str
    limit: float
    conditions: str
