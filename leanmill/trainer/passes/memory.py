"""Memory that is freed goes back to the system, where glibc would keep it in pieces that no tensor fits."""

from __future__ import annotations

import contextlib
import ctypes


_M_MMAP_THRESHOLD = -3
"""glibc's number of the setting (malloc.h)."""
_LARGE_BYTES = 2**18


def return_large_blocks() -> None:
    """Have every block of 1 MiB or more mapped by itself, and unmapped as soon as it is freed, from now on.

    By itself glibc raises the limit to the largest block that was ever freed, up to 32 MiB, which are
    most weights, and keeps what is below. Without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """Return what small blocks have left free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
