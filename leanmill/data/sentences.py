"""Pairs of sentences that belong together, or are said how alike they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.data.config import HfDataset
from leanmill.data.conversations import Where


KNOWN_FIELDS = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("sentence1", "sentence2"),
    ("question", "answer"),
    ("query", "answer"),
)
"""Columns that public datasets call the two texts, the first that a row has."""


@dataclass(frozen=True)
class SentencePair:
    """Two texts, and perhaps others that do not fit the first."""

    texts: tuple[str, ...]
    """The two, then hard negatives."""
    score: float | None = None
    """How alike the two are, in whatever unit; None where they simply belong together."""


def sentence_pair_of(row: Mapping[str, Any], config: HfDataset, where: Where) -> SentencePair | None:
    """Return the pair of a row; None where a text is missing or blank.

    Args:
        row: Values by column.
        config: Names the columns.
        where: Names the row for a person.

    Raises:
        ConfigError: It has no such columns, or something else in them; the message names the row.
    """
    texts = [_text(row[name], name, where) for name in _fields(row, config, where)]
    if not all(texts):
        return None
    negatives = _negatives(row.get(config.negatives_field), config.negatives_field, where)
    return SentencePair((*texts, *negatives), _score(row.get(config.score_field), config.score_field, where))


def _fields(row: Mapping[str, Any], config: HfDataset, where: Where) -> tuple[str, str]:
    first, second = config.first_field, config.second_field
    known = [(first or one, second or other) for one, other in KNOWN_FIELDS]
    found = next((pair for pair in known if all(name in row for name in pair)), None)
    if found is None:
        raise ConfigError(
            f"data.source.first_field: {where()} has no two columns such as {' and '.join(known[0])}, it has "
            f"{', '.join(sorted(row))}; set first_field and second_field to two of them"
        )
    return found


def _text(value: Any, column: str, where: Where) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            f"column {column!r} holds {type(value).__name__}, not text, in {where()}; set "
            f"data.source.first_field and second_field to columns with text"
        )
    return value if value.strip() else ""


def _negatives(value: Any, column: str, where: Where) -> list[str]:
    given = [value] if isinstance(value, str) else value or []
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise ConfigError(
            f"column {column!r} must hold a text or a list of texts, in {where()}; correct the row, or set "
            f"data.source.negatives_field to another column"
        )
    return [one for one in given if one.strip()]


def _score(value: Any, column: str, where: Where) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(
            f"column {column!r} must hold a finite number, and holds {value!r} in {where()}; correct the row, or set "
            f"data.source.score_field to another column"
        )
    return float(value)
