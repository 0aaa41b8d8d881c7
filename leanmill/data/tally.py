"""What became of the rows that were read: kept, left to the other split, or dropped and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from leanmill.core.errors import ConfigError


MANY_PASSES = 40
"""Past about 40 passes over the same text more of them gain nothing (Muennighoff et al. 2023,
"Scaling Data-Constrained Language Models", arXiv:2305.16264)."""

NO_TEXT = "without text"
NO_MESSAGES = "without messages"
NO_PAIR = "without a prompt and two answers"
NO_SENTENCES = "without two texts"
NO_ANSWER = "without an assistant turn"
FAR_ANSWER = "whose answer begins after sequence_length"

_REMEDIES = {
    NO_TEXT: "fill {column}, or set data.source.text_field to the column with the text",
    NO_MESSAGES: "fill {column}, or set data.source.messages_field to the column with the turns",
    NO_PAIR: "fill the columns prompt, chosen and rejected",
    NO_SENTENCES: "fill {column} and the second one, or name the columns in data.source.first_field and second_field",
    NO_ANSWER: "add a turn with role assistant to each, or train on plain text with data.task=pretrain",
    FAR_ANSWER: "raise data.sequence_length",
}


@dataclass
class Dropped:
    """Rows left out for one reason."""

    count: int
    first: int
    """Number of the first of them."""
    where: str = ""
    """The first of them for a person, e.g. `row 3 of chats.jsonl`."""


@dataclass
class Tally:
    """Counts of one reading, which a reader keeps up as it goes."""

    num_rows: int = 0
    """Rows read so far, which is also the number of the row just read."""
    num_other: int = 0
    """Rows of the other split: held out while training rows are read, and the reverse."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """By reason."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """Return what `state` was taken of."""
        return cls(**{**state, "dropped": {reason: Dropped(**d) for reason, d in state["dropped"].items()}})

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def drop(self, reason: str, row: int) -> None:
        """Count row number `row` as left out."""
        dropped = self.dropped.setdefault(reason, Dropped(0, row))
        dropped.count += 1
        dropped.first = min(dropped.first, row)

    def locate(self, name: Callable[[int], str]) -> None:
        """Fill `where` of every reason; `name` turns a row's number into words."""
        for dropped in self.dropped.values():
            dropped.where = dropped.where or name(dropped.first)

    def describe(self) -> str:
        """The counts for the log: `rows: 120 read, 3 held out, 2 without text`."""
        held_out = [f"{self.num_other:,} held out"] if self.num_other else []
        return ", ".join(
            [f"rows: {self.num_rows:,} read", *held_out, *(f"{d.count:,} {why}" for why, d in self.dropped.items())]
        )

    def warnings(self, name: str, column: str) -> list[str]:
        """One line a reason for which rows of the source `name` were left out."""
        return [
            f"{d.count:,} of {self.num_rows:,} rows of {name!r} {why} are left out, the first is {d.where}; "
            f"{_REMEDIES[why].format(column=column)}"
            for why, d in self.dropped.items()
        ]

    def nothing_left(self, name: str, column: str) -> ConfigError:
        """Say why no row of the source `name` can be used; `column` is e.g. `column 'text'`."""
        if not self.num_rows:
            return ConfigError(f"data.source: {name!r} is empty, it has no rows; give data that is not empty")
        if not self.dropped:
            return ConfigError(
                f"data.source: all {self.num_rows:,} rows of {name!r} are held out and none is left to train on; lower "
                f"data.source.validation_fraction or add rows"
            )
        why, d = max(self.dropped.items(), key=lambda item: item[1].count)
        return ConfigError(
            f"data.source: nothing of {name!r} can be used ({self.describe()}; the first is {d.where}); "
            f"{_REMEDIES[why].format(column=column)}"
        )


def many_passes(name: str, passes: str) -> str:
    """Warn of text that is repeated more than `MANY_PASSES` times."""
    return (
        f"{name!r} is trained for {passes} passes, and past some {MANY_PASSES} a model only learns it by heart; add "
        f"text, shorten the run (train.total_tokens), or lower its weight"
    )
