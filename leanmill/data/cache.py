"""Folders that are built once and read by every rank of every later run."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanmill.core.errors import RunError
from leanmill.core.paths import expand_user
from leanmill.kernels.native.user_cache import user_cache


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of all caches: `cache_dir`, or the user's own, see `user_cache`."""
    return expand_user(cache_dir) if cache_dir is not None else user_cache()


def fingerprint(value: Any) -> str:
    """Hash anything JSON can hold; 16 hex digits, the same on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cached_folder(root: Path, kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `root/kind/key`, building it first where it does not exist.

    Of all processes that ask at once, on one machine or on a shared file system with locks, one
    builds and the others wait. The folder appears by one rename, so a killed build leaves nothing
    that looks complete; its lock goes with the process.

    Args:
        root: Folder of all caches.
        kind: What is cached, e.g. `tokens`.
        key: Fingerprint of everything the content depends on.
        build: Fills the (temporary) folder it is given.

    Raises:
        RunError: The folder cannot be written.
    """
    final = root / kind / key
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_suffix(".lock")):
            if not final.is_dir():
                _build_and_rename(final, build)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise RunError(
                f"cannot write the data cache {final.parent}: {error.strerror}; free space there or set data.cache_dir "
                f"to a folder that can be written"
            ) from error
        raise
    return final


def _build_and_rename(final: Path, build: Callable[[Path], None]) -> None:
    for stale in final.parent.glob(f".{final.name}.*"):  # the lock is ours, so whoever made these is gone
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        build(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted JSON."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
