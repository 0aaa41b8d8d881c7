"""Keep credentials out of what is written."""

from __future__ import annotations

import re
from typing import Any


REDACTED = "<redacted>"
_SECRET_KEY = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|passphrase|credentials?|api_?key|access_?key|private_?key|auth)$", re.I
)
_NOT_SECRET_KEY = re.compile(r"^(bos|eos|pad|unk|mask|sep|cls|image|audio|video|boi|eoi|end|start|stop)_token$", re.I)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|xox[abpr]-[\w-]{10,}"
    r"|A(KIA|SIA)[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)\b"
)
_URL_CREDENTIALS = re.compile(r"(\w+://)[^/\s:@]*:?[^/\s@]*@")


def redact(value: Any, key: str = "") -> Any:
    """Return a copy of a JSON-like value with credentials replaced by `<redacted>`.

    A string is taken for one when its key ends in a word such as `token`, `secret` or `api_key`
    (special tokens like `pad_token` excepted), or when it looks like a key of a known service;
    user names and passwords inside URLs go as well.
    """
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET_KEY.search(key) and not _NOT_SECRET_KEY.match(key):
        return REDACTED
    return _URL_CREDENTIALS.sub(rf"\1{REDACTED}@", _SECRET_VALUE.sub(REDACTED, value))
