"""One run at a time in a run folder.

`run.lock` says who is there: machine, process and since when. It comes into being whole, by one hard
link, and its holder touches it now and then. A later run that finds it asks:

- Same machine (same boot, same process table): does that process live, and is it the one that was
  started then? Process numbers are used again, so the start counts too.
- Another machine, or a container whose processes cannot be seen: has the file been touched? Host
  names and process numbers of containers repeat, so they prove nothing. Times are compared by the
  clock of the file system, since machines disagree about theirs.

A run that was paused long enough to be taken for dead finds out before it writes a checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from leanmill.core.errors import ConfigError, RunError
from leanmill.parallel.collectives import broadcast_object
from leanmill.trainer.lock_holder import Holder, lives, read_holder, this_machine, this_process


log = logging.getLogger(__name__)

FILE_NAME = "run.lock"
BEAT_SECONDS = 15.0
"""Time between two touches by the holder."""
SILENT_SECONDS = 180.0
"""A holder that cannot be asked counts as gone after this long without a touch."""
_POLL_SECONDS = 1.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@contextmanager
def exclusive(run_dir: Path, rank: int) -> Iterator[RunLock]:
    """Hold `run_dir` for this run; collective, and every rank learns of a refusal.

    Args:
        run_dir: The run folder, created where missing.
        rank: This process's rank; rank 0 holds the lock.

    Raises:
        ConfigError: Another run is there, or the folder cannot be written.
        RunError: The disk is full.
    """
    lock, refusal = RunLock(run_dir), ["", ""]
    if rank == 0:
        try:
            lock.acquire()
        except (ConfigError, RunError) as error:
            refusal = [type(error).__name__, str(error)]
    kind, message = broadcast_object(refusal)
    if message:
        raise (ConfigError if kind == "ConfigError" else RunError)(message)
    try:
        yield lock
    finally:
        lock.release()


def is_held(run_dir: Path) -> bool:
    """Whether a process seems to train in `run_dir` now: it lives, or its lock was touched not long ago."""
    found = read_holder(run_dir / FILE_NAME)
    if found is None:
        return False
    holder, touched = found
    if holder is not None and holder.machine == this_machine():
        return lives(holder)
    return time.time() - touched < SILENT_SECONDS


class RunLock:
    """The lock of one run folder, from `acquire` to `release`.

    Args:
        run_dir: The run folder.
        beat_seconds: Time between two touches.
        silent_seconds: When a holder on another machine counts as gone.
    """

    def __init__(
        self, run_dir: Path, *, beat_seconds: float = BEAT_SECONDS, silent_seconds: float = SILENT_SECONDS
    ) -> None:
        self.run_dir, self.path = run_dir, run_dir / FILE_NAME
        self.beat_seconds, self.silent_seconds = beat_seconds, silent_seconds
        self._mine: Holder | None = None
        self._own_file = run_dir / f".{FILE_NAME}.{secrets.token_hex(8)}"
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None
        self._holding = threading.Lock()
        self._made_folder = False

    def acquire(self) -> None:
        """Take the lock; take it over from a run that is gone, and say so.

        Raises:
            ConfigError: Another run holds it, or the folder cannot be written.
            RunError: The disk is full.
        """
        try:
            self._made_folder = not self.run_dir.exists()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._mine = this_process()
            while not self._create():
                self._displace()
        except OSError as error:
            self._mine = None
            raise self._cannot_write(error) from error
        except BaseException:
            self._mine = None
            raise
        self._beat = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._beat.start()

    def check(self) -> None:
        """Return if the lock is still this run's, or was never taken by this process.

        Raises:
            RunError: Another run took it over.
        """
        if self._mine is None:
            return
        holder = self._still_held()
        if holder is not None:
            raise RunError(
                f"run_dir={self.run_dir} was taken over by another run ({holder}), as if this one were gone: it was "
                f"paused or cut off for more than {self.silent_seconds:.0f} s, or {self.path} was removed. Nothing "
                f"more is written; stop one of the two and resume"
            )

    def release(self) -> None:
        """Give the lock back; a lock that is another run's by now stays."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        with self._holding:
            mine, self._mine = self._mine, None
            if mine is None:
                return
            with suppress(OSError):
                found = read_holder(self.path)
                if found is not None and found[0] == mine:
                    self.path.unlink()
                if self._made_folder:
                    self.run_dir.rmdir()  # which works only if nothing was written into it

    # Taking

    def _create(self) -> bool:
        """Create the lock whole; return whether there was none."""
        assert self._mine is not None
        text = json.dumps(asdict(self._mine))
        try:
            self._own_file.write_text(text, encoding="utf-8")
            os.link(self._own_file, self.path)
        except FileExistsError:
            # Over NFS the answer of a link that worked can be lost, and its repetition fails.
            return self._own_file.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS or not self._own_file.exists():
                raise
            return self._create_without_links(text)
        finally:
            self._own_file.unlink(missing_ok=True)
        return True

    def _create_without_links(self, text: str) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _displace(self) -> None:
        """Return when the present lock is gone or was a dead run's and is out of the way; refuse otherwise."""
        found = read_holder(self.path)
        if found is None:
            return
        holder, touched = found
        if holder is not None and holder.machine == this_machine():
            if lives(holder):
                raise ConfigError(
                    f"run_dir={self.run_dir} is in use: {holder}; wait for that run to end, stop it "
                    f"(kill {holder.pid}), or give another run_dir"
                )
            reason = "which is gone"
        else:
            if not self._is_silent(holder, touched):
                return
            reason = f"of which nothing was heard for {self.silent_seconds:.0f} s"
        if self._move_aside(holder):
            log.warning("taking over run_dir=%s from %s, %s", self.run_dir, holder or "an unknown process", reason)

    def _is_silent(self, holder: Holder | None, touched: float) -> bool:
        """Watch a lock whose holder cannot be asked; return False when it is no longer there.

        Raises:
            ConfigError: Its holder touched it.
        """
        who, told = holder or "an unknown process", False
        while (silent := self._now() - touched) < self.silent_seconds:
            if not told:
                log.warning(
                    "run_dir=%s is in use by %s, last heard of %.0f s ago; waiting up to %.0f s to see whether it "
                    "lives. If it is gone: rm %s",
                    self.run_dir, who, silent, self.silent_seconds - silent, self.path,
                )  # fmt: skip
                told = True
            time.sleep(min(_POLL_SECONDS, self.silent_seconds / 10))
            found = read_holder(self.path)
            if found is None or found[0] != holder:
                return False
            if found[1] != touched:
                raise ConfigError(
                    f"run_dir={self.run_dir} is in use: {who}, and alive; wait for that run to end, stop it there, "
                    f"or give another run_dir"
                )
        return True

    def _move_aside(self, judged: Holder | None) -> bool:
        """Take a dead run's lock away by one rename; return whether it was that one."""
        with self._alone():
            # Who waited here finds the lock of the one that was quicker. To take that away, if only for a moment,
            # would let a third one in beside it.
            found = read_holder(self.path)
            if found is None or found[0] != judged:
                return False
            return self._rename(judged)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time look and rename, where the file system knows locks of folders (NFS does not)."""
        folder = os.open(self.run_dir, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _rename(self, judged: Holder | None) -> bool:
        try:
            os.rename(self.path, self._own_file)
        except FileNotFoundError:
            return False
        found = read_holder(self._own_file)
        same = found is not None and found[0] == judged
        if not same:  # another run was quicker, and this is its lock
            with suppress(OSError):
                os.link(self._own_file, self.path)
        self._own_file.unlink(missing_ok=True)
        return same

    def _now(self) -> float:
        """Return the time by the clock of the file system."""
        self._own_file.touch()
        os.utime(self._own_file)
        now = self._own_file.stat().st_mtime
        self._own_file.unlink()
        return now

    def _cannot_write(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(f"run_dir={self.run_dir}: the disk is full; free space there or give another run_dir")
        return ConfigError(
            f"run_dir={self.run_dir} cannot be written: {error.strerror or error}; give a folder that can, e.g. "
            f"run_dir=runs/{{name}}"
        )

    # Holding

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            with suppress(OSError):
                holder = self._still_held(touch=True)
                if holder is not None:
                    log.error("run_dir=%s was taken over by %s; this run ends at its next save", self.run_dir, holder)
                    return

    def _still_held(self, *, touch: bool = False) -> Holder | str | None:
        """Return None while the lock is this run's (put back where it was removed), else who has it."""
        with self._holding:
            if self._mine is None:
                return None
            found = read_holder(self.path)
            if found is None and self._create():
                return None
            if found is None or found[0] != self._mine:
                found = read_holder(self.path)
                return None if found is not None and found[0] == self._mine else (found and found[0]) or "unknown"
            if touch:
                os.utime(self.path)
            return None
