"""Pairs of answers to one prompt, of which one was preferred.

A row has `chosen` and `rejected`, and mostly a `prompt`; each is text or a list of turns. Without a prompt both are
whole conversations, alike up to the answer; with one they may be that too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.data.conversations import Turns, Where, check_messages, with_tools


_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt."""

    prompt: Turns
    """Its tools, if any, are in the first turn."""
    chosen: Turns
    """At least one turn, the last one the assistant's; of `rejected` too."""
    rejected: Turns

    def conversations(self, other: Turns | None = None) -> list[tuple[Turns, int]]:
        """Return the prompt with either answer, and with `other` if one is given; and how many turns answer in each."""
        answers = [answer for answer in (self.chosen, self.rejected, other) if answer is not None]
        return [(self.prompt + answer, sum(t["role"] == "assistant" for t in answer)) for answer in answers]


def pair_of(row: Mapping[str, Any], where: Where) -> Pair | None:
    """Return the pair of a row; None where it has no prompt or lacks an answer.

    Args:
        row: Values by column.
        where: Names the row for a person.

    Raises:
        ConfigError: It is no pair, or its answers are equal; the message names the row.
    """
    for column in _ANSWERS:
        if column not in row:
            raise ConfigError(
                f"data.task: preference needs the columns chosen and rejected, mostly with a prompt, and {where()} has "
                f"{', '.join(sorted(row))}; rename columns, or set data.task=sft for single conversations"
            )
    prompt = _turns(row.get("prompt"), "user", "prompt", where)
    chosen, rejected = (_turns(row[column], "assistant", column, where) for column in _ANSWERS)
    if prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:  # answers that bring it along
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif not prompt:
        shared = _num_shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not chosen and not rejected and prompt:
        raise ConfigError(_equal(where))
    if not (prompt and chosen and rejected):
        return None
    if chosen == rejected:
        raise ConfigError(_equal(where))
    for column, answer in zip(_ANSWERS, (chosen, rejected), strict=True):
        if answer[-1]["role"] != "assistant":
            raise ConfigError(
                f"column {column!r} in {where()} ends with a turn of {answer[-1]['role']!r}, not of the assistant; "
                f"correct the row"
            )
    system = _turns(row.get("system"), "system", "system", where)
    return Pair(with_tools([*system, *prompt], row, where), chosen, rejected)


def _turns(value: Any, role: str, column: str, where: Where) -> Turns:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return check_messages(value, lambda: f"column {column!r} in {where()}")


def _num_shared(one: Turns, other: Turns) -> int:
    """Turns at the beginning that both have."""
    alike = [a == b for a, b in zip(one, other, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def _equal(where: Where) -> str:
    return f"{where()} has the same answer as chosen and as rejected, which prefers nothing; remove the row"
