"""Where this user's caches lie: the one place that decides it.

Containers and batch systems run as users without a home folder, or with one that cannot be written.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path


logger = logging.getLogger(__name__)


def user_cache() -> Path:
    """Return `~/.cache/leanmill`, or a folder of this user under the system's temporary one.

    The folder exists and can be written. All processes of a user on one machine get the same one; what
    was fallen back to, and why, is logged once.
    """
    try:
        folder = Path.home() / ".cache" / "leanmill"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = f"{folder} cannot be written"
    except RuntimeError:
        reason = "this user has no home folder"
    except OSError as error:
        reason = f"{error.filename} cannot be made ({error.strerror})"
    return _temporary(reason)


def is_private(status: os.stat_result) -> bool:
    """Whether what has this status is this user's and nobody else may write to it."""
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


@functools.cache
def _temporary(reason: str) -> Path:
    """A folder with a fixed name, or a fresh one where somebody else has taken that name."""
    folder = Path(tempfile.gettempdir()) / f"leanmill-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = is_private(folder.lstat())
    except OSError:
        is_ours = False
    if not is_ours:
        folder = Path(tempfile.mkdtemp(prefix="leanmill-"))
    # Once a machine: its other processes find the same.
    level = logging.WARNING if os.environ.get("LOCAL_RANK", "0") == "0" else logging.DEBUG
    logger.log(level, "%s: caches of data and kernels go to %s", reason, folder)
    return folder
