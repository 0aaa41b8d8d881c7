"""Writing small files so that a reader never sees half of one. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from leanmill.core.errors import RunError


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it there.

    Raises:
        RunError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}; free space there or give another run_dir") from error
