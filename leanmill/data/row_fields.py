"""From a row of columns to a document: the text, or the conversation, that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from leanmill.core.errors import ConfigError
from leanmill.data.config import HfDataset
from leanmill.data.encoding import Document, check_messages
from leanmill.data.tally import NO_MESSAGES, NO_TEXT


class RowField:
    """The column that holds documents.

    Args:
        config: Names the columns.
        task: Whether documents are texts or conversations.
        is_text: Whether rows are pieces of text files, whose column is `text`.
    """

    def __init__(self, config: HfDataset, task: Literal["pretrain", "sft"], *, is_text: bool) -> None:
        self._config, self._task = config, task
        named = config.text_field if task == "pretrain" else config.messages_field
        self._field = "text" if is_text else named
        self.column = f"column {self._field!r}"

    def document(self, row: dict[str, Any], where: Callable[[], str]) -> Document | None:
        """Return the document of a row; None where the field is empty.

        Args:
            row: Values by column.
            where: Names the row for a person; called only for a message.
        """
        what = "text_field" if self._task == "pretrain" else "messages_field"
        if self._field not in row:
            raise ConfigError(
                f"data.source.{what}: {self._config.path!r} has no column {self._field!r}; it has "
                f"{', '.join(sorted(row))}; set {what} to one of them (read in {where()})"
            )
        value = row[self._field]
        if value is None or value == "" or value == []:
            return None
        if self._task == "sft":
            messages = check_messages(value, lambda: f"data.source.messages_field: {self.column} in {where()}")
            return messages if any(str(turn.get("content", "")).strip() for turn in messages) else None
        if not isinstance(value, str):
            raise ConfigError(
                f"data.source.text_field: {self.column} holds {type(value).__name__}, not text, in {where()}; set "
                f"text_field to a column with text, or task: sft for conversations"
            )
        return value if value.strip() else None

    @property
    def empty_reason(self) -> str:
        """What a row is without, when it has no document."""
        return NO_TEXT if self._task == "pretrain" else NO_MESSAGES
