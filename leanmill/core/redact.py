"""Keeps credentials out of everything a run writes. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from leanmill.core.secrets import is_secret, mask_secrets


MASK = "[redacted]"
_MIN_SECRET_LENGTH = 8
"""Shorter values (`1`, `true`, `default`) are settings, and replacing them would eat plain text."""

_SECRET_WORDS = frozenset(
    [
        "key",
        "apikey",
        "token",
        "secret",
        "password",
        "passwd",
        "passphrase",
        "credential",
        "credentials",
        "auth",
        "pat",
        "bearer",
    ]
)
# Keys of Weights & Biases before 2025: 40 hex digits, which is also what a git commit looks like. A
# commit is needed to repeat the run, and it always follows its name.
_HEX_KEY = re.compile(r"(?<!revision: )(?<!revision=)(?<!revision: ')(?<!commit )(?<!@)\b[0-9a-f]{40}\b")
# At least one character that prose has not, so that `basic understanding` stays.
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+(?=\S*[0-9=_+/])[A-Za-z0-9._~+/=-]{8,}")


def redact(text: str) -> str:
    """Replace credentials in `text`: values of environment variables with secret-looking names, and known shapes.

    Known shapes are those of `mask_secrets`, bearer and basic authorisation, and bare 40-digit keys.
    """
    for value in _secret_values():
        text = text.replace(value, MASK)
    text = mask_secrets(text, MASK)
    text = _HEX_KEY.sub(MASK, text)
    return _BEARER.sub(rf"\1 {MASK}", text)


def redact_tree(value: Any, field: str = "") -> Any:
    """Redact every string inside nested mappings and sequences, and whatever a secret-looking field holds.

    Args:
        value: JSON-able data.
        field: Name of the field that holds `value`.
    """
    if isinstance(value, Mapping):
        return {key: redact_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item, field) for item in value]
    if not isinstance(value, str):
        return value
    if is_secret(field, "") and len(value) >= _MIN_SECRET_LENGTH:
        return MASK
    if field in ("revision", "commit") and re.fullmatch(r"[0-9a-f]{40}", value) and value not in _secret_values():
        return value
    return redact(value)


def _secret_values() -> list[str]:
    """Values worth hiding, longest first so that none is left half-replaced by a shorter one."""
    values = {value for name, value in os.environ.items() if _is_secret(name, value)}
    return sorted(values, key=len, reverse=True)


def _is_secret(name: str, value: str) -> bool:
    if len(value) < _MIN_SECRET_LENGTH or not _SECRET_WORDS & set(re.split(r"[^a-z]+", name.lower())):
        return False
    # A path to a credentials file or a socket is no secret, and often a prefix of other paths.
    return not os.path.exists(value)
