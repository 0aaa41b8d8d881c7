"""Probes: what a technique looks at while held-out text is evaluated, domain by domain. They never change the maths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor

    from leanmill.core.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe has to say of one evaluation; plain Python values."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers to log beside the scores, `metric` or `metric/layer`."""
    table: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able, for `metrics.jsonl` and the report."""
    notes: tuple[str, ...] = ()
    """Lines for the user: what could not be said, and why."""


class Probe(ABC):
    """Counts something over the tokens of an evaluation, on every rank.

    An evaluation calls `take` once to start anew; then for each domain `begin` before each of its forwards, in eval
    mode, and `take` after the last; and `find` at the end, with what the ranks counted together.
    """

    name: str
    """What its metrics and its table go by."""

    def begin(self, batch: Batch) -> None:  # noqa: B027 (nothing to do is the rule)
        """Look at a batch before its forward. Rows of which no token has a label only stand in for missing ones."""

    @abstractmethod
    def take(self) -> Tensor:
        """Return what this rank has counted since the last call, 1-D, of the same length each time; start anew."""

    @abstractmethod
    def find(self, counts: Mapping[str, Tensor]) -> Finding:
        """Return what it found.

        Args:
            counts: By domain, what `take` returned, fp64 on the CPU, summed over ranks.
        """
