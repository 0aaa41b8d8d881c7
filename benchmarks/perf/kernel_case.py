"""What a kernel is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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


@dataclass(frozen=True)
class MemoryCase:
    """A ratio of bytes: ours / peer, to stay at or below `limit`."""

    name: str
    ours_bytes: Callable[[], int]
    peer_bytes: Callable[[], int]
    peer_name: str
    limit: float
    conditions: str
