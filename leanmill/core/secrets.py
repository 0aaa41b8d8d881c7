"""Recognising credentials, so that none is ever saved, logged or shown. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


# Keys of model configs such as `pad_token_id` or `image_token` must pass, so a bare `token` counts
# only as the whole key or after a word that makes it a credential.
_KEY = re.compile(
    r"(^token$)|((api|access|auth|hf|hub|bearer|wandb|private|secret)[_-]?(key|token)$)|secret|passw(or)?d|credential",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\w+://[^/\s:@]+:[^/\s@]+@"
)
HIDDEN = "<hidden>"


def is_secret(key: str, value: Any) -> bool:
    """Whether `key: value` looks like a credential, by the key's name or the value's form."""
    if isinstance(value, str) and _VALUE.search(value):
        return True
    return bool(_KEY.search(key)) and isinstance(value, str | int) and not isinstance(value, bool)


def find_secrets(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of everything inside `value` (mappings, lists, scalars) that looks like a credential."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from find_secrets(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from find_secrets(item, (*path, index))
    elif is_secret(str(path[-1]) if path else "", value):
        yield path


def shown(key: str, value: Any, max_length: int = 60) -> str:
    """Return `value` for an error message: short, and hidden where it looks like a credential."""
    if is_secret(key, value) or any(find_secrets(value)):
        return HIDDEN
    text = repr(value)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."
