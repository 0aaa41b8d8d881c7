"""Bringing checkpoints to an object store beside training, and back from there.

Each rank brings its share of a save's files in a thread of its own, without collectives, and leaves a mark; rank 0
waits for the marks and writes the manifest. What fails is said and costs nothing: the checkpoint on this machine's
disk stays, training goes on, and the next save is brought again.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import Agreement, complete_checkpoints, problem_of
from leanmill.checkpoint.folders import WRITING, begin, publish, remove, step_folder
from leanmill.checkpoint.manifest import MANIFEST, read_manifest
from leanmill.checkpoint.remote import RemoteFolder, name_of, one_line
from leanmill.checkpoint.retention import kept
from leanmill.core.errors import RunError


T = TypeVar("T")

log = logging.getLogger(__name__)

_TRIES = 3
_FIRST_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.5
_FAILED = b"failed "
PATIENCE_SECONDS = 900.0
"""How long rank 0 waits for the shares of others, once it has brought its own; four times its own time if longer."""


class Taken(RunError):
    """Another run writes to the same place."""


class Uploads:
    """Brings the saves of one run to `remote`. Methods are collective, and called by one thread at a time.

    Args:
        remote: Where to.
        root: Folder of the checkpoints.
        config: Which ones stay there: as here.
        group: The ranks that save together.
        damaged: Folders that are not brought; whoever finds one adds it.
    """

    def __init__(
        self, remote: RemoteFolder, root: Path, config: CheckpointConfig, group: Agreement, damaged: Set[Path]
    ) -> None:
        self.remote, self.root, self.config, self.group = remote, root, config, group
        self._damaged = damaged
        self._token = ""
        self._attempt = 0
        """How often this run began to bring a save, on every rank the same."""
        self._thread: threading.Thread | None = None
        self._folder: Path | None = None
        self.highest_at_start = 0
        """The highest sequence there when this run began, of saves finished or not; rank 0 knows it."""
        self._brought = 0
        """The sequence of the newest save that is there, as far as rank 0 knows."""
        self._is_taken = False

    def in_use(self) -> Path | None:
        """Return the folder that is being brought."""
        return self._folder if self._is_busy() else None

    def begin(self) -> None:
        """Claim the place, and bring the newest checkpoint where it is not there yet.

        Raises:
            RunError: The store cannot be read or written.
        """
        problem = ""
        if self.group.rank == 0:
            self._token = secrets.token_hex(8)
            try:
                self.remote.claim(self._token)
                self._brought = next((manifest.sequence for _, manifest in self.remote.saves()), 0)
                self.highest_at_start = self.remote.highest_sequence()
            except RunError as error:
                problem = str(error)
        problem, self._token = json.loads(self.group.broadcast(json.dumps([problem, self._token])))
        if problem:
            raise RunError(f"{problem}; put it right, or type checkpoint.remote=null to train without it")
        self._bring_what_is_missing()

    def offer(self, folder: Path) -> None:
        """Bring a complete checkpoint, unless an earlier one is still on its way: then the next one is."""
        wanted = self.group.rank == 0 and not self._is_busy() and not self._is_taken
        if self.group.broadcast(str(folder) if wanted else ""):
            self._start(folder)

    def close(self) -> None:
        """Wait until the newest checkpoint is there, or cannot be brought."""
        self._join()
        if self._bring_what_is_missing():
            self._join()

    def _bring_what_is_missing(self) -> bool:
        newest = ""
        if self.group.rank == 0 and not self._is_taken:
            sound = [(path, found) for path, found in complete_checkpoints(self.root) if path not in self._damaged]
            newest = str(sound[0][0]) if sound and sound[0][1].sequence > self._brought else ""
        newest = self.group.broadcast(newest)
        if newest:
            self._start(Path(newest))
        return bool(newest)

    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, folder: Path) -> None:
        self._join()
        self._folder = folder
        self._attempt += 1
        # A daemon: who ends a run in a hurry does not wait for a network.
        self._thread = threading.Thread(target=self._bring, args=(folder, self._attempt), name="upload", daemon=True)
        self._thread.start()

    # In the thread

    def _bring(self, folder: Path, attempt: int) -> None:
        started = time.monotonic()
        try:
            manifest = _patiently(lambda: read_manifest(folder))  # another machine may see it a moment later
            name = name_of(manifest)
            self._check_claim()
            for file in sorted(manifest.files)[self.group.rank :: self.group.size]:
                _patiently(lambda file=file: self.remote.put(folder / file, f"{name}/{file}"))  # type: ignore[misc]
            if self.group.rank != 0:
                self._mark(name, self._mark_of(folder, attempt))
                return
            self._wait_for_others(name, self._mark_of(folder, attempt), time.monotonic() - started)
            self._check_claim()
            _patiently(lambda: self.remote.put(folder / MANIFEST, f"{name}/{MANIFEST}"))
            self._brought = manifest.sequence
            size = sum(record.size for record in manifest.files.values())
            seconds = time.monotonic() - started
            log.info("brought %s to %s: %.1f MB in %.1f s", folder, self.remote.url, size / 1e6, seconds)
            self._clear_away(name)
        except Taken as error:
            self._is_taken = True
            log.error("%s", error)
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises must not end a run)
            log.warning(
                "%s was not brought to %s: %s; it stays on this machine, and the newest one is tried again at the next "
                "save, at the end and when the run goes on",
                folder,
                self.remote.url,
                error if isinstance(error, RunError) else one_line(error),
            )
            with suppress(Exception):  # a store that takes nothing does not take this either
                name = name_of(read_manifest(folder))
                if self.group.rank != 0:
                    self._mark(name, _FAILED + self._mark_of(folder, attempt))
                elif self.remote.is_claimed_by(self._token):
                    self.remote.delete_save(name)  # of a store that is full, halves would keep it so

    def _mark_of(self, folder: Path, attempt: int) -> bytes:
        """Return what stands in the marks of an attempt: files of an earlier one at the same save may be deleted."""
        return f"{self._token} {attempt} ".encode() + (folder / MANIFEST).read_bytes()

    def _mark(self, name: str, mark: bytes) -> None:
        """Tell rank 0 what became of this rank's share of a save."""
        _patiently(lambda: self.remote.write(f"{name}/.rank-{self.group.rank}", mark))

    def _check_claim(self) -> None:
        if self.group.rank == 0 and not _patiently(lambda: self.remote.is_claimed_by(self._token)):
            raise Taken(
                f"another run has begun to write to {self.remote.url}, so this one brings nothing there any more; its "
                f"checkpoints stay in {self.root}. Give each run a checkpoint.remote of its own, e.g. with {{name}}"
            )

    def _wait_for_others(self, name: str, mark: bytes, own_seconds: float) -> None:
        marks = {f".rank-{rank}" for rank in range(1, self.group.size)}
        until = time.monotonic() + max(PATIENCE_SECONDS, 4 * own_seconds)
        missing = set(marks)
        while missing:
            there = missing & _patiently(lambda: self.remote.present(name))
            said = {one: _patiently(lambda one=one: self.remote.read(f"{name}/{one}")) for one in there}  # type: ignore[misc]
            if failed := sorted(one for one, content in said.items() if content == _FAILED + mark):
                raise RunError(f"rank {failed[0].rpartition('-')[2]} could not bring its share")
            missing -= {one for one, content in said.items() if content == mark}
            if missing and time.monotonic() > until:
                raise RunError(f"{', '.join(sorted(missing))} of {len(marks)} shares did not arrive")
            if missing:
                time.sleep(_POLL_SECONDS)

    def _clear_away(self, brought: str) -> None:
        """Delete what need not stay there; what was never finished goes too. The next save tries again."""
        try:
            self.remote.delete(f"{brought}/.rank-{rank}" for rank in range(1, self.group.size))
            keep = kept(self.remote.saves(), self.config) | {brought}
            for name in self.remote.names():
                if name not in keep:
                    self.remote.delete_save(name)
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises)
            log.warning("%s was not tidied after %s: %s", self.remote.url, brought, one_line(error))


def _patiently(action: Callable[[], T]) -> T:
    pause = _FIRST_PAUSE_SECONDS
    for _ in range(_TRIES - 1):
        try:
            return action()
        except FileNotFoundError:
            raise  # what was deleted, here or there, no second try brings back
        except Exception:  # noqa: BLE001 (whatever a store's client raises)
            time.sleep(pause)
            pause *= 4
    return action()


def fetch_newest(remote: RemoteFolder, root: Path, group: Agreement, *, above: int = 0) -> Path | None:
    """Bring the newest sound save to this machine's folder; collective.

    Args:
        remote: Where from.
        root: Folder of the checkpoints, which all ranks see.
        group: Who fetches together; files are shared out.
        above: Only saves with a higher sequence.

    Returns:
        The checkpoint, or None where none is newer.

    Raises:
        RunError: The store cannot be read.
    """
    problem, listed = "", []
    if group.rank == 0:
        try:
            listed = [[name, m.step] for name, m in remote.saves() if m.sequence > above]
        except RunError as error:
            problem = str(error)
    problem, listed = json.loads(group.broadcast(json.dumps([problem, listed])))
    if problem:
        raise RunError(f"{problem}; put it right, or type checkpoint.remote=null to go on without it")
    for name, step in listed:
        temporary = step_folder(root, step).with_suffix(WRITING)
        if not (problem := _fetch(remote, name, temporary, group)):
            if group.rank == 0:
                publish(temporary)
                log.info("fetched %s from %s", name, remote.url)
            group.total(0)  # nobody looks before it has its name
            return temporary.with_suffix("")
        if group.rank == 0:
            log.warning("skipping damaged checkpoint %s/%s: %s", remote.url, name, problem)
            with suppress(OSError):
                remove(temporary)
    return None


def _fetch(remote: RemoteFolder, name: str, folder: Path, group: Agreement) -> str:
    """Fill a folder; return what is wrong with it, equal on all ranks.

    Raises:
        RunError: On all ranks, where the store or this disk failed: nobody knows whether the save there is sound.
    """

    def failure_of(action: Callable[[], object]) -> str:
        try:
            action()
        except (FileNotFoundError, RunError):
            return ""  # a file that is missing there, or a damaged manifest: looking at the folder says so
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises)
            return one_line(error)
        return ""

    def get_share() -> None:
        for file in sorted(read_manifest(folder).files)[group.rank :: group.size]:
            _patiently(lambda file=file: remote.get(f"{name}/{file}", folder / file))  # type: ignore[misc]

    def get_manifest() -> None:
        begin(folder)
        _patiently(lambda: remote.get(f"{name}/{MANIFEST}", folder / MANIFEST))

    failure = group.broadcast(failure_of(get_manifest) if group.rank == 0 else "")
    failure = failure or next((text for text in group.gather(failure_of(get_share)) if text), "")
    if failure:
        raise RunError(
            f"fetching {remote.url}/{name} failed: {failure}; put it right and start again, or give a checkpoint on "
            f"this machine as checkpoint.resume"
        )
    return problem_of(folder, group)
