"""Paths as a user writes them."""

from __future__ import annotations

from pathlib import Path

from leanmill.core.errors import ConfigError


def expand_user(path: str) -> Path:
    """Return `path` with a leading `~` replaced by the home folder.

    Raises:
        ConfigError: There is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path!r}: {path.partition('/')[0]} has no home folder here; write the whole path") from None
