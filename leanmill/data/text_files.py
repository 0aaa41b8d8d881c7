"""Text files as documents: a file is one, and lies on one side of the split alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from leanmill.data.encoding import document_digest


MAX_DOCUMENT_CHARS = 4 << 20
"""Longer files are cut at line ends about every so many characters: a tokenizer holds some fifty times its text."""


def text_rows(files: list[str], held_out_share: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yield the documents of files as rows: `text`, `file` and `is_tail`.

    `file` is the same in all parts of a file: a hash of its beginning, so that copies of a file go where it goes.
    `is_tail` is None, unless a share of one single file is to be held out, which has to be cut for it.

    Args:
        files: Paths, UTF-8.
        held_out_share: Of a single file, the share at its end that is held out.
    """
    for path in files:
        length = sum(map(len, _parts(path))) if held_out_share else 0
        border, done, file = max(1, int(length * (1 - held_out_share))), 0, ""
        for part in _parts(path):
            file = file or document_digest(part).hex()
            if not held_out_share:
                yield {"text": part, "file": file, "is_tail": None}
                continue
            cut = _line_start(part, border - done) if done < border <= done + len(part) else 0
            if cut:
                yield {"text": part[:cut], "file": file, "is_tail": False}
            if cut < len(part):
                yield {"text": part[cut:], "file": file, "is_tail": bool(cut) or done >= border}
            done += len(part)


def _parts(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        while part := file.read(MAX_DOCUMENT_CHARS):
            yield part + ("" if part.endswith("\n") else file.readline())


def _line_start(text: str, place: int) -> int:
    """Return where the line after `place` starts, or the one before; `place` itself in a single line."""
    after = text.find("\n", place - 1) + 1
    if 0 < after < len(text):
        return after
    return text.rfind("\n", 0, max(0, place - 1)) + 1 or min(place, len(text) - 1)
