"""Completions that must be right word for word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.evaluate.asking import Asked
from leanmill.evaluate.scores import Score, by_group
from leanmill.recipe.evaluate import Completions


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt and what may follow it."""

    prompt: str
    answers: tuple[str, ...]
    """Without blanks around them."""
    group: str


def read_items(config: Completions) -> list[Item]:
    """Read the file of a task.

    Raises:
        ConfigError: It is not there, or a line is no item.
    """
    path = expand_user(config.path)
    if not path.is_file():
        raise ConfigError(f"tasks: completions.path={config.path!r} does not exist; give a file of JSON Lines")
    items: list[Item] = []
    # Other ends of lines than this one may stand in the texts themselves.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip() and (config.limit is None or len(items) < config.limit):
            items.append(_item(config, line, f"{config.path} line {number}"))
    if not items:
        raise ConfigError(f"tasks: completions.path={config.path!r} holds no item; give one a line")
    return items


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"tasks: completions.path={str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}); write it so"
        ) from None


def _item(config: Completions, line: str, where: str) -> Item:
    try:
        raw: Any = json.loads(line)
        prompt, answers = raw[config.prompt_field], raw[config.answer_field]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(
            f"{where} is no item; write an object such as "
            f'{{"{config.prompt_field}": "2 + 2 =", "{config.answer_field}": "4"}}, or set prompt_field and '
            f"answer_field"
        ) from None
    texts = [answers] if isinstance(answers, str) else answers
    if not isinstance(prompt, str) or not prompt or not isinstance(texts, list) or not texts:
        raise ConfigError(
            f"{where}: give {config.prompt_field} some text and {config.answer_field} a text or a list of them"
        )
    stripped = tuple(str(text).strip() for text in texts)
    if not all(stripped) or any(stop in text for text in stripped for stop in config.stops):
        raise ConfigError(
            f"{where}: an answer is empty or holds one of stops={config.stops}, so no continuation can be it; change "
            f"the answer, or set stops"
        )
    return Item(prompt=prompt, answers=stripped, group=str(raw.get(config.group_field, "all")))


@dataclass
class _Going:
    """An item that is being continued."""

    item: Item
    index: int
    ids: list[int]
    new: list[int] = field(default_factory=list)


def ask(config: Completions, items: Sequence[Item], asked: Asked) -> list[Score]:
    """Continue every prompt by the likeliest token until it is answered, or can no longer be, and score by group.

    Raises:
        ConfigError: A prompt does not fit the model.
    """
    going = [_Going(item, index, _ids(config, item, asked)) for index, item in enumerate(items)]
    right = [False] * len(items)
    for count in range(1, config.max_new_tokens + 1):
        if not going:
            break
        rows = [torch.tensor(one.ids + one.new) for one in going]
        for one, logits in zip(going, asked.last_logits(rows, 1), strict=True):
            one.new.append(_likeliest(logits[0]))
        verdicts = [
            _verdict(config, one, asked.opened.tokenizer, is_last=count == config.max_new_tokens) for one in going
        ]
        for one, verdict in zip(going, verdicts, strict=True):
            right[one.index] = bool(verdict)
        going = [one for one, verdict in zip(going, verdicts, strict=True) if verdict is None]
    return by_group(config.name, [item.group for item in items], right)


def _likeliest(logits: Tensor) -> int:
    # A model that gives NaN says nothing; argmax would say NaN is the largest.
    return int(logits.nan_to_num(nan=-torch.inf).argmax())


def _ids(config: Completions, item: Item, asked: Asked) -> list[int]:
    ids: list[int] = asked.opened.tokenizer(item.prompt)["input_ids"]
    longest = asked.opened.longest
    if longest is not None and len(ids) + config.max_new_tokens > longest:
        raise ConfigError(
            f"{config.name}: the prompt {item.prompt[:40]!r}... has {len(ids)} tokens, and with "
            f"{config.max_new_tokens} more it is longer than the model's {longest}; shorten it, or lower max_new_tokens"
        )
    return ids


def _verdict(config: Completions, one: _Going, tokenizer: Any, *, is_last: bool) -> bool | None:
    """Whether the continuation is an answer; None while that is open."""
    ended = one.new[-1] == tokenizer.eos_token_id
    text: str = tokenizer.decode(one.new[:-1] if ended else one.new)
    ends = [text.index(stop) for stop in config.stops if stop in text]
    if ends or ended or is_last:
        return (text[: min(ends)] if ends else text).strip() in one.item.answers
    # A character may come in several tokens.
    so_far = text.lstrip().rstrip("\N{REPLACEMENT CHARACTER}")
    is_open = any(answer.startswith(so_far) or so_far.rstrip() == answer for answer in one.item.answers)
    return None if is_open else False
