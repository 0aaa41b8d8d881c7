"""Conversations in the formats that datasets have them in, as turns of `{role, content}`.

A row may be written in one of these; `auto` takes the one that its columns fit:

- `messages`: OpenAI's, a list of turns in the column `messages_field`, tools as `tools` beside it;
- `sharegpt`: a list of `{from, value}` in the column `conversations`;
- `alpaca`: `instruction`, `input` and `output`;
- `prompt_completion`: `prompt` and `completion`, each text or a list of turns.

The tools a conversation may call travel in its first turn, under the key `tools`, to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from leanmill.core.errors import ConfigError


RowFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
Turns = list[dict[str, Any]]
Where = Callable[[], str]

COLUMNS: Mapping[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),  # the name is the recipe's to choose
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
"""What a row of each format has, at least."""
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Speakers of ShareGPT files."""


def format_of(columns: Collection[str], messages_field: str, where: Where) -> RowFormat:
    """Return the format that the columns of a row fit.

    A column `messages_field` is what it says, whatever else is there.

    Raises:
        ConfigError: None does, or several.
    """
    if messages_field in columns:
        return "messages"
    fitting = [name for name, needed in COLUMNS.items() if set(needed) <= set(columns) and name != "messages"]
    if len(fitting) == 1:
        return fitting[0]
    has = ", ".join(sorted(columns))
    if fitting:
        raise ConfigError(
            f"data.source.row_format: rows fit {' and '.join(fitting)} ({where()} has {has}); set row_format to one"
        )
    known = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in COLUMNS.items() if name != "messages")
    raise ConfigError(
        f"data.source.messages_field: no column {messages_field!r}; it has {has}; set messages_field to one of them, "
        f"or rename columns to those of another row_format ({known}; read in {where()})"
    )


def turns_of(row: Mapping[str, Any], row_format: RowFormat, messages_field: str, where: Where) -> Turns:
    """Return the turns of a row; empty where there are none.

    Raises:
        ConfigError: The row is not of that format; the message names it.
    """
    columns = COLUMNS[row_format] if row_format != "messages" else (messages_field,)
    for column in columns:
        if column not in row:
            raise ConfigError(
                f"data.source.row_format: {row_format} needs the column {column!r}, and {where()} has "
                f"{', '.join(sorted(row))}; set row_format to the format of the rows, or rename columns"
            )
    turns = _READERS[row_format](row, messages_field, where)
    return _with_tools(turns, row, where)


def _messages(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    return check_messages(row[field], lambda: f"data.source.messages_field: column {field!r} in {where()}")


def _sharegpt(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    turns: Turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row["conversations"] or []:
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _ROLES or not isinstance(turn.get("value"), str):
            raise ConfigError(
                f"column 'conversations' in {where()} must be a list of {{from, value}} with from one of "
                f"{', '.join(_ROLES)}, got {str(turn)[:80]!r}; correct the row"
            )
        turns.append({"role": _ROLES[speaker], "content": turn["value"]})
    return turns


def _alpaca(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    task, given, answer = (_text(row, key, where) for key in ("instruction", "input", "output"))
    if not (task or given) and not answer:
        return []
    system: Turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    question = "\n\n".join(part for part in (task, given) if part)
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt_completion(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    turns: Turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            turns += check_messages(row[key], lambda key=key: f"column {key!r} in {where()}")  # type: ignore[misc]
        elif text := _text(row, key, where):
            turns.append({"role": role, "content": text})
    return turns


_READERS: Mapping[RowFormat, Callable[[Mapping[str, Any], str, Where], Turns]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _text(row: Mapping[str, Any], key: str, where: Where) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"column {key!r} in {where()} holds {type(value).__name__}, not text; correct the row")
    return value or ""


def check_messages(value: Any, where: Where) -> Turns:
    """Return `value` as turns of a conversation; `where` names it in a message.

    Arguments of tool calls become mappings, as chat templates want them; what a columnar file filled up with null goes.

    Raises:
        ConfigError: It is not a list of {role, content}.
    """
    good = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and ("content" in turn or turn.get("tool_calls"))
        for turn in value
    )
    if not good:
        raise ConfigError(f"{where()} must be a list of {{role, content}} turns, got {str(value)[:80]!r}")
    return [_turn(turn) for turn in value]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {key: item for key, item in turn.items() if item is not None}
    if calls := kept.get("tool_calls"):
        kept |= {"content": kept.get("content", ""), "tool_calls": [_call(_without_null(call)) for call in calls]}
    return kept


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        parsed = _json(function["arguments"])
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return call


def _with_tools(turns: Turns, row: Mapping[str, Any], where: Where) -> Turns:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools) if tools.strip() else None
        if tools is None and row["tools"].strip():
            raise ConfigError(f"column 'tools' in {where()} is no JSON; correct the row")
    if not tools or not turns:
        return turns
    if not isinstance(tools, list):
        raise ConfigError(f"column 'tools' in {where()} must be a list of functions; correct the row")
    return [{**turns[0], "tools": _without_null(tools)}, *turns[1:]]


def split_tools(turns: Turns) -> tuple[Turns, list[Any] | None]:
    """Return a conversation's turns and its tools, None without any."""
    if not turns or "tools" not in turns[0]:
        return turns, None
    return [{key: item for key, item in turns[0].items() if key != "tools"}, *turns[1:]], turns[0]["tools"]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
