"""Output folders that are complete or not there at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leanmill.core.errors import ConfigError, RunError


SUMMARY = "leanmill.json"
"""What passes did to a model, in its folder."""
ADAPTER = "adapter"
"""Folder beside a model's weights with what a pass took out of them, as an adapter of PEFT's."""


def check_is_new(path: Path) -> None:
    """Refuse an output that is there already; cheap, so ask it before anything slow.

    Raises:
        ConfigError: `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists already; give a new folder as the output, or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well.

    Whatever goes wrong inside, nothing stays behind.

    Raises:
        ConfigError: `path` exists and is not an empty folder.
        RunError: The disk is full or refuses.
    """
    check_is_new(path)
    temporary = path.parent / f"{_unfinished(path)}{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except Exception as error:
        if _is_disk_error(error):
            raise RunError(f"cannot write {path}: {_reason(error)}; free some space or give another folder") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_unfinished(path: Path) -> None:
    """Remove what killed processes left of `path`; call it only where no other process may be writing it."""
    for left in path.parent.glob(f"{glob.escape(_unfinished(path))}*"):
        shutil.rmtree(left, ignore_errors=True)


def _unfinished(path: Path) -> str:
    return f".{path.name}.tmp-"


def folder_bytes(path: Path) -> int:
    """Return the size of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _is_disk_error(error: Exception) -> bool:
    # safetensors reports the operating system's error as text only.
    return isinstance(error, OSError) or type(error).__module__.startswith("safetensors")


def _reason(error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "StorageFull" in str(error)
    return "the disk is full" if full else " ".join(str(error).split())
