"""A rank ends with the torchrun that started it. No torch is imported here: this runs first of all.

torchrun starts each rank in a session of its own, so nothing that kills torchrun reaches the ranks
by itself. A rank left behind would train on, and write into the folder of the job that replaced it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time


_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5


def end_with_launcher() -> None:
    """Have this process killed once torchrun, its parent, is gone.

    Only under torchrun: the parent of a rank started by srun or by hand may leave when it likes.
    The kernel does it where it can (Linux), else a thread looks twice a second. Killed rather than
    stopped with a checkpoint: whoever killed torchrun may start the next job at once, and two runs
    must not write into one folder.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if not _kernel_kills_with_parent():
        threading.Thread(target=_watch, args=(parent,), name="launcher-watch", daemon=True).start()
    elif os.getppid() != parent:
        _die()  # It went between the two calls, too early for the kernel to tell.


def _kernel_kills_with_parent() -> bool:
    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0)
    except (AttributeError, OSError, TypeError):
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
