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
_KNOWN_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bwandb_v\d+_\w{16,}"  # Weights & Biases, since 2025
    r"|\b(?:sk|rk|pk)-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic and the like
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS key ids
    r"|\bxox[abeoprs]-[\w-]{10,}"  # Slack
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"  # JSON web tokens
)
# Of a web address whatever stands before the @ (a token needs no colon), of others only a password:
# `ssh://git@host` names a user.
_URL_USER = re.compile(
    r"(?i)(\bhttps?://)(?!\[redacted\]@)[^/?#\s]+(?=@)|(://)(?!\[redacted\]@)[^/?#\s]*:[^/?#\s]+(?=@)"
)
_URL_PARAMETER = re.compile(r"([?&;#])([\w.~%-]+)=(?!\[redacted\])([^&;#\s\"'<>]+)")
_PARAMETER_WORDS = frozenset(
    ("auth", "credential", "credentials", "jwt", "key", "keyid", "passphrase", "pat", "pwd", "sas", "sig", "signature")
)
_PARAMETER_ENDS = ("token", "secret", "password", "passwd", "apikey")
HIDDEN = "<hidden>"


def is_secret(key: str, value: Any) -> bool:
    """Whether `key: value` looks like a credential, by the key's name or the value's form."""
    if isinstance(value, str) and mask_secrets(value, HIDDEN) != value:
        return True
    # A URL that was cut at its `=` leaves the name of the parameter at the end of the key.
    name = re.split(r"[?&;#]", key)[-1]
    return bool(_KEY.search(name)) and isinstance(value, str | int) and not isinstance(value, bool)


def mask_secrets(text: str, mask: str) -> str:
    """Replace what has the form of a credential.

    These are keys of known services, user and password in a URL, and parameters of a URL with telling
    names (`?token=`, `&X-Amz-Signature=`).
    """
    text = _KNOWN_FORMS.sub(mask, text)
    text = _URL_USER.sub(lambda found: f"{found[1] or found[2]}{mask}", text)
    return _URL_PARAMETER.sub(
        lambda found: f"{found[1]}{found[2]}={mask}" if _is_secret_parameter(found[2]) else found[0], text
    )


def _is_secret_parameter(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    joined = "".join(words[-2:]).lower()
    return joined in _PARAMETER_WORDS or any(
        word.lower() in _PARAMETER_WORDS or word.lower().endswith(_PARAMETER_ENDS) for word in words
    )


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
