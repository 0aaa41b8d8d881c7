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
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
"""What a row has, at least; one of `messages` has the column that the recipe names."""
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
    fitting = [name for name, needed in COLUMNS.items() if set(needed) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    has = ", ".join(sorted(columns))
    if fitting:
        raise ConfigError(
            f"data.source.row_format: rows fit {' and '.join(fitting)} ({where()} has {has}); set row_format to one"
        )
    known = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in COLUMNS.items())
    raise ConfigError(
        f"data.source.messages_field: no column {messages_field!r}; it has {has}; set messages_field to one of them, "
        f"or rename columns to those of another row_format ({known}; read in {where()})"
    )


def turns_of(row: Mapping[str, Any], row_format: RowFormat, messages_field: str, where: Where) -> Turns:
    """Return the turns of a row; empty where there are none, without an answer where the row has none.

    Answers to nothing (no instruction and input, no prompt) are no turns either.

    Raises:
        ConfigError: The row is not of that format; the message names it.
    """
    for column in COLUMNS.get(row_format, (messages_field,)):
        if column not in row:
            raise ConfigError(
                f"data.source.row_format: {row_format} needs the column {column!r}, and {where()} has "
                f"{', '.join(sorted(row))}; set row_format to the format of the rows, or rename columns"
            )
    turns = _READERS[row_format](row, messages_field, where)
    return with_tools(turns, row, where)


def _messages(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    return check_messages(row[field], lambda: f"data.source.messages_field: column {field!r} in {where()}")


def _sharegpt(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    turns, given = _system(row, where), row["conversations"] or []
    for turn in given if isinstance(given, list) else [given]:
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(turn.get("value"), str):
            raise ConfigError(
                f"column 'conversations' in {where()} must be a list of {{from, value}} with from one of "
                f"{', '.join(_ROLES)}, got {str(turn)[:80]!r}; correct the row"
            )
        turns.append({"role": _ROLES[speaker], "content": turn["value"]})
    return turns


def _alpaca(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    task, given, answer = (_text(row, key, where) for key in ("instruction", "input", "output"))
    question = "\n\n".join(part for part in (task, given) if part)
    if not question.strip():
        return []
    turns: Turns = [*_system(row, where), {"role": "user", "content": question}]
    return [*turns, {"role": "assistant", "content": answer}] if answer.strip() else turns


def _system(row: Mapping[str, Any], where: Where) -> Turns:
    text = _text(row, "system", where)
    return [{"role": "system", "content": text}] if text else []


def _prompt_completion(row: Mapping[str, Any], field: str, where: Where) -> Turns:
    turns: Turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            turns += check_messages(row[key], lambda key=key: f"column {key!r} in {where()}")  # type: ignore[misc]
        elif (text := _text(row, key, where)).strip():
            turns.append({"role": role, "content": text})
        if not turns:
            return []
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

    Arguments of tool calls that are a mapping in JSON become one, as chat templates want them, other text stays; what a
    columnar file filled up with null goes.

    Raises:
        ConfigError: It is not a list of {role, content}, or `tool_calls` of a turn is not a list of mappings.
    """
    for turn in value if isinstance(value, list) else [value]:
        if not isinstance(value, list) or not _is_turn(turn):
            raise ConfigError(
                f"{where()} must be a list of {{role, content}} turns, content text or a list of parts, got "
                f"{str(turn)[:80]!r}; correct the row"
            )
        if turn.get("tool_calls") is not None and not _are_mappings(turn["tool_calls"]):
            raise ConfigError(
                f"{where()} has tool_calls {str(turn['tool_calls'])[:80]!r}, which must be a list of calls "
                f"{{type, function}}; correct the row"
            )
    return [_turn(turn) for turn in value]


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return bool(turn.get("tool_calls")) if content is None else isinstance(content, (str, list))


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {key: item for key, item in turn.items() if item is not None}
    if calls := kept.get("tool_calls"):
        kept |= {"content": kept.get("content", ""), "tool_calls": [_call(_without_null(call)) for call in calls]}
    return kept


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        parsed = _json(function["arguments"])
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return call


def with_tools(turns: Turns, row: Mapping[str, Any], where: Where) -> Turns:
    """Return the turns of a row with its tools in the first.

    Raises:
        ConfigError: The row's `tools` are no list of functions.
    """
    tools = _checked_tools(row.get("tools"), lambda: f"column 'tools' in {where()}")
    return [{**turns[0], "tools": tools}, *turns[1:]] if tools and turns else turns


def split_tools(turns: Turns) -> tuple[Turns, list[Any] | None]:
    """Return a conversation's turns and its tools, None without any.

    Raises:
        ConfigError: The first turn came with `tools` that are no list of functions.
    """
    if not turns or "tools" not in turns[0]:
        return turns, None
    tools = _checked_tools(turns[0]["tools"], lambda: "'tools' of the first turn")
    return [{key: item for key, item in turns[0].items() if key != "tools"}, *turns[1:]], tools


def _checked_tools(tools: Any, where: Where) -> list[Any] | None:
    """Functions, as a list or JSON; None without any."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ConfigError(f"{where()} is no JSON; correct the row") from error
    if tools is None:
        return None
    if not _are_mappings(tools):
        raise ConfigError(f"{where()} must be a list of functions, got {str(tools)[:80]!r}; correct the row")
    return _without_null(tools) or None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
