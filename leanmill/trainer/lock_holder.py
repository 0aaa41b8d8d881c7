"""Who holds a run folder, and whether that process still lives."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run folder."""

    host: str
    machine: str
    """One boot of one machine and one process table in it: where process numbers mean the same."""
    pid: int
    started: str
    """When the process was started, in the system's own unit: tells it from a later one of the same number."""
    since: float
    """Seconds since 1970."""
    token: str
    """Tells this lock from every other."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


def this_process() -> Holder:
    """Return this process as the holder of a lock that is new."""
    return Holder(
        host=platform.node() or "unknown",
        machine=this_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        since=time.time(),
        token=secrets.token_hex(8),
    )


def this_machine() -> str:
    """Name one boot of this machine and the process table that this process lives in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def lives(holder: Holder) -> bool:
    """Whether a process of this machine is there and is the one that took the lock."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, so it is there
    started = _started(holder.pid)
    return started is None or started == holder.started


def _started(pid: int) -> str | None:
    """Return when a process was started, `ended` for one that only waits to be collected, None where unknown."""
    try:
        # The name, in brackets, may hold anything; state is the first field behind it, the start the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    import psutil

    try:
        process = psutil.Process(pid)
        return "ended" if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return None


def read_holder(path: Path) -> tuple[Holder | None, float] | None:
    """Return a lock's holder (None where its text is torn) and when it was last touched; None without a lock."""
    try:
        # Opened, not only looked at: over NFS that asks the server instead of a cache.
        with path.open(encoding="utf-8") as file:
            touched, text = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None
    try:
        return Holder(**json.loads(text)), touched
    except (ValueError, TypeError):
        return None, touched
