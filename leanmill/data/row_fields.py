"""From a row of columns to a document: the text, or the conversation, that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.data.config import HfDataset, Task
from leanmill.data.conversations import RowFormat, format_of, turns_of
from leanmill.data.encoding import Document
from leanmill.data.pairs import pair_of
from leanmill.data.sentences import KNOWN_FIELDS, sentence_pair_of
from leanmill.data.tally import NO_MESSAGES, NO_PAIR, NO_SENTENCES, NO_TEXT


class RowField:
    """The columns that hold documents.

    Args:
        config: Names the columns.
        task: Whether documents are texts, conversations or pairs of answers.
        is_text: Whether rows are pieces of text files, whose column is `text`.
    """

    def __init__(self, config: HfDataset, task: Task, *, is_text: bool) -> None:
        self._config, self._task = config, task
        self._field = "text" if is_text else config.text_field
        self._format: RowFormat | None = None if config.row_format == "auto" else config.row_format
        names: dict[Task, str] = {"sft": config.messages_field, "preference": "chosen"}
        if task == "sentence_pairs":
            names[task] = config.first_field or KNOWN_FIELDS[0][0]
        self.column = f"column {names.get(task, self._field)!r}"

    def document(self, row: dict[str, Any], where: Callable[[], str]) -> Document | None:
        """Return the document of a row; None where it has none.

        Args:
            row: Values by column.
            where: Names the row for a person; called only for a message.
        """
        if self._task == "preference":
            return pair_of(row, where)
        if self._task == "sentence_pairs":
            return sentence_pair_of(row, self._config, where)
        return self._conversation(row, where) if self._task == "sft" else self._text(row, where)

    def _conversation(self, row: dict[str, Any], where: Callable[[], str]) -> Document | None:
        field = self._config.messages_field
        # The first row decides for all: files whose rows are of several formats are several sources.
        self._format = self._format or format_of(row, field, where)
        if self._format == "messages" and not row.get(field, True):
            return None
        turns = turns_of(row, self._format, field, where)
        return turns if any(_says_something(turn) for turn in turns) else None

    def _text(self, row: dict[str, Any], where: Callable[[], str]) -> Document | None:
        if self._field not in row:
            raise ConfigError(
                f"data.source.text_field: {self._config.path!r} has no column {self._field!r}; it has "
                f"{', '.join(sorted(row))}; set text_field to one of them (read in {where()})"
            )
        value = row[self._field]
        if value is None or value == "" or value == []:
            return None
        if not isinstance(value, str):
            raise ConfigError(
                f"data.source.text_field: {self.column} holds {type(value).__name__}, not text, in {where()}; set "
                f"text_field to a column with text, or task: sft for conversations"
            )
        return value if value.strip() else None

    @property
    def empty_reason(self) -> str:
        """What a row is without, when it has no document."""
        of_task: dict[Task, str] = {"sft": NO_MESSAGES, "preference": NO_PAIR, "sentence_pairs": NO_SENTENCES}
        return of_task.get(self._task, NO_TEXT)


def _says_something(turn: dict[str, Any]) -> bool:
    return bool(str(turn.get("content", "")).strip() or turn.get("tool_calls"))
