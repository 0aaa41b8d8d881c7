"""Scores of models, and what one lost against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model reached in one group of one task."""

    task: str
    group: str
    """A domain, a kind of question, a length; `all` is over all of them."""
    metric: str
    value: float
    count: int
    """Of what `value` is the mean: tokens, items."""
    lower_is_better: bool = False
    items: tuple[bool, ...] | None = None
    """Whether each item was right, in an order that is the same for every model; None where that is not known."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What the score is of."""
        return self.task, self.group, self.metric


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one model lost against a dense one in one group."""

    score: Score
    dense: Score

    @property
    def loss(self) -> float:
        """What the bound is held against; above 0 is worse, and infinite where the score is no number.

        Of shares that should be high (accuracy) the fall itself, 0.02 being two points; of figures that should be low
        (bits a byte, perplexity) the rise as a share of the dense model's.
        """
        value, dense = self.score.value, self.dense.value
        if not math.isfinite(value):
            return math.inf
        if not math.isfinite(dense):
            return -math.inf
        if self.score.lower_is_better:
            return (value - dense) / max(abs(dense), 1e-12)
        return dense - value

    @property
    def changed(self) -> float | None:
        """Share of items that one of the two had right and the other wrong; a mean can hide it."""
        if self.score.items is None or self.dense.items is None:
            return None
        return sum(a != b for a, b in zip(self.score.items, self.dense.items, strict=True)) / len(self.score.items)

    @property
    def standard_error(self) -> float | None:
        """Of the difference of accuracies, item by item; None where items are not known."""
        changed, count = self.changed, self.score.count
        if changed is None:
            return None
        return math.sqrt(max(0.0, changed - self.loss**2) / count)


def differences(scores: Sequence[Score], dense: Sequence[Score]) -> list[Difference]:
    """Pair the scores of a model with those of the dense one, in its order; what only one of them has is left out."""
    known = {score.key: score for score in scores}
    return [Difference(score=known[one.key], dense=one) for one in dense if one.key in known]


def beyond(found: Sequence[Difference], bound: float) -> list[Difference]:
    """Return the groups in which more than `bound` was lost."""
    return [one for one in found if one.loss > bound]


def by_group(task: str, groups: Sequence[str], right: Sequence[bool]) -> list[Score]:
    """Return the accuracy of each group, and of all items where there is more than one group.

    Args:
        task: Its name.
        groups: Of each item.
        right: Whether it was answered.
    """
    names = list(dict.fromkeys(groups))
    found = [
        _accuracy(task, name, [is_right for group, is_right in zip(groups, right, strict=True) if group == name])
        for name in names
    ]
    return found if len(names) == 1 else [*found, _accuracy(task, "all", right)]


def _accuracy(task: str, group: str, right: Sequence[bool]) -> Score:
    share = sum(right) / len(right)
    return Score(task=task, group=group, metric="accuracy", value=share, count=len(right), items=tuple(right))


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return scores as plain values; null where a model gave no number."""
    return [
        {
            "task": one.task,
            "group": one.group,
            "metric": one.metric,
            "value": number(one.value),
            "count": one.count,
            "lower_is_better": one.lower_is_better,
        }
        for one in scores
    ]


def number(value: float | None) -> float | None:
    """Return a number, or None for what JSON has no word for."""
    return value if value is not None and math.isfinite(value) else None
