"""Saving, finding, loading and pruning the checkpoints of a run.

A save goes into `step-XXXXXXXX.tmp`; every file is flushed, the manifest comes last, and a rename
makes the folder count, see `folders.py`. Whatever kills the run in between leaves the earlier
checkpoints as they were. All ranks must see the same `run_dir`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from leanmill.checkpoint.components import take_apart
from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import complete_checkpoints, locate, newest_sound
from leanmill.checkpoint.folders import settle, step_folder
from leanmill.checkpoint.group import SaveGroup
from leanmill.checkpoint.loading import check_kind, read_part
from leanmill.checkpoint.manifest import Manifest, read_manifest
from leanmill.checkpoint.reading import read_document
from leanmill.checkpoint.remote import RemoteFolder, is_url
from leanmill.checkpoint.retention import Retention
from leanmill.checkpoint.snapshot import Snapshot, Snapshots
from leanmill.checkpoint.uploads import Uploads, fetch_newest
from leanmill.checkpoint.workers import OUTER, WORKERS, Stateful, WorkersState, load_workers, named
from leanmill.checkpoint.writing import Job, Writer, versions
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.redact import redact_tree
from leanmill.parallel.collectives import gather_objects


log = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. Construction, `save`, `wait`, `find` and `load` are collective.

    Args:
        run_dir: Folder of the run; checkpoints lie in its `checkpoints/`.
        config: When and what to keep.
        overlap: The caller promises to call `finish_copies` before anything writes trained
            parameters or optimizer state after a `save`. Then those are copied beside the next
            forward and backward passes instead of while `save` runs.
        before_write: Called on rank 0 before a save writes anything; a RunError from it ends the save.
        remote: Where copies go, a URL; None keeps none.
        worker: Which of several groups of ranks this one is of, each with all of the model (`layout.low_comm`), and its
            rank in there. What is equal on all of them, the first writes.
        in_parts: Whether ranks hold different parameters (`layout.pp`): each saves and loads its own.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        *,
        overlap: bool = False,
        before_write: Callable[[], None] = lambda: None,
        remote: str | None = None,
        worker: tuple[int, int] | None = None,
        in_parts: bool = False,
    ) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.config = config
        self.overlap = overlap
        self.group = SaveGroup()
        self._retention = Retention(self.root, config)
        self._uploads = None
        if remote is not None:
            self._uploads = Uploads(RemoteFolder(remote), self.root, config, self.group, self._retention.damaged)
            self._retention.spare(self._uploads.in_use)
        self._writer = Writer(
            root=self.root,
            group=self.group,
            retention=self._retention,
            before_write=before_write,
            highest_elsewhere=lambda: 0 if self._uploads is None else self._uploads.highest_at_start,
        )
        self._in_parts = in_parts
        self._is_first_worker = worker is None or worker[0] == 0
        self._snapshots = Snapshots(self.group.rank if worker is None else worker[1])
        self._thread: threading.Thread | None = None
        self._job: Job | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        engine: Stateful,
        train_state: Mapping[str, Any],
        recipe_json: Mapping[str, Any],
        *,
        score: float | None = None,
        names: Collection[str] | None = None,
        base: str | None = None,
    ) -> float:
        """Save the state of this moment; written in the background when the config says so.

        Args:
            step: Optimizer steps done.
            engine: Whose model and optimizer to save, and what workers have of their own.
            train_state: What `load` gives back, JSON-able.
            recipe_json: The resolved recipe; credentials in it are redacted.
            score: Validation loss of this step, where known; lower is better.
            names: Names of the model's parameters and buffers to save; None saves all. An adapter
                run gives those it trains.
            base: Fingerprint of the model the rest comes from, see `fingerprint.py`.

        Returns:
            Seconds the caller was kept from training.

        Raises:
            RunError: This save, or an earlier one in the background, failed.
        """
        started = time.perf_counter()
        self.wait()
        parts = self._take(engine, names)
        documents = {
            "train_state.json": json.loads(json.dumps(train_state)),
            "recipe.json": redact_tree(recipe_json),
            "versions.json": versions(),
        }
        job = Job(step=step, parts=parts, documents=documents, score=score, partial=names is not None, base=base)
        if self.config.asynchronous:
            self._job = job
            # A daemon: one that waits for a lost rank must not keep the process.
            self._thread = threading.Thread(
                target=self._write_in_background, args=(job,), name="checkpoint", daemon=True
            )
            self._thread.start()
            if not self.overlap:
                self.finish_copies()
        else:
            self._write(job)
        return time.perf_counter() - started

    def _take(self, engine: Stateful, names: Collection[str] | None) -> dict[str, Snapshot]:
        """Hold on to the tensors of this moment; those that training writes later may be copied later."""
        model = engine.model_state()
        kept = model if names is None else {name: tensor for name, tensor in model.items() if name in names}
        states = {"model": kept, "optimizer": take_apart(engine.optimizer_state())}
        trained = {name.rpartition("/")[0] for name in states["optimizer"]}
        if not self._is_first_worker:
            states = dict.fromkeys(states, {})
        if isinstance(engine, WorkersState):
            states[OUTER] = engine.outer_state() if self._is_first_worker else {}
            states[WORKERS] = named(engine.worker_state(), engine.worker)
        put_off = dict.fromkeys(states, lambda _: True) | {"model": trained.__contains__} if self.overlap else {}
        return {
            part: self._snapshots.take(
                part, state, copy=self.config.asynchronous, put_off=put_off.get(part, lambda _: False)
            )
            for part, state in states.items()
        }

    def finish_copies(self) -> float:
        """Return once training may write parameters and optimizer state again; cheap when it may already.

        Returns:
            Seconds waited; together with what `save` returned, how long a save stalls training.
        """
        started = time.perf_counter()
        if self._job is not None:
            self._job.copied.wait()
            for snapshot in self._job.parts.values():
                snapshot.protect()
            self._job = None
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            RunError: It failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = self._job = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the save in flight, and until the newest is at the remote place, where there is one.

        Raises:
            RunError: The save failed.
        """
        self.wait()
        if self._uploads is not None:
            self._uploads.close()

    def drain(self, seconds: float | None = None) -> None:
        """Wait for the save in flight without raising: for a run that is failing for another reason.

        Args:
            seconds: The longest wait, where a rank may be gone that the save needs; the save then never counts.
        """
        if seconds is not None and self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                log.warning("the save under way cannot end without the lost rank; the checkpoint before it counts")
                return
        try:
            self.wait()
        except RunError as error:
            log.error("%s", error)

    def find(self, resume: str) -> Path | None:
        """Return the checkpoint that `checkpoint.resume` asks for.

        Args:
            resume: `auto`, `never`, or a path to a checkpoint or a run folder.

        Raises:
            ConfigError: `never` in a folder that has checkpoints, or a path that is none.
            RunError: The given checkpoint, or each one found, is damaged.
        """
        if resume == "auto":
            return self._newest()
        if resume == "never":
            if where := self._where_checkpoints_are():
                raise ConfigError(
                    f"checkpoint.resume=never, but {where} has checkpoints; give another run_dir, "
                    f"or type checkpoint.resume=auto to continue"
                )
            return None
        try:
            return self._fetched(resume) if is_url(resume) else locate(resume, self.group).path
        except (ConfigError, RunError) as error:
            raise type(error)(f"checkpoint.resume={resume}: {error}") from error

    def newest_sequence(self) -> int:
        """Return the `Manifest.sequence` of the newest complete checkpoint here, by the first rank; 0 without one."""
        found = complete_checkpoints(self.root)
        return int(self.group.broadcast(str(found[0][1].sequence if found else 0)))

    def newest_before(self, step: int, *, below: int | None = None) -> Path | None:
        """Return the newest sound checkpoint here of fewer than `step` steps, None without one.

        Args:
            step: Optimizer steps.
            below: Only such as have a `Manifest.sequence` below this.

        Raises:
            RunError: There are such, and each is damaged.
        """

        def is_wanted(manifest: Manifest) -> bool:
            return manifest.step < step and (below is None or manifest.sequence < below)

        return newest_sound(self.root, self.group, is_wanted=is_wanted).path

    def _newest(self) -> Path | None:
        """The newest sound checkpoint, here or at the remote place."""
        path, problem = None, None
        try:
            found = newest_sound(self.root, self.group)
            path = found.path
            self._retention.damaged |= {path.with_suffix("") for path in found.skipped}
        except RunError as error:
            problem = error
        if self._uploads is not None:
            above = 0 if path is None else read_manifest(path).sequence
            fetched = fetch_newest(self._uploads.remote, self.root, self.group, above=above)
            if fetched is not None:
                self._retention.damaged.discard(fetched)
                path = fetched
        if path is None and problem is not None:
            raise problem
        return path

    def _where_checkpoints_are(self) -> str:
        """Where this run has checkpoints already, on every rank; empty where it has none."""
        where = [str(self.root)] if self.latest() else []
        if self._uploads is not None:
            remote = self._uploads.remote
            self.group.on_first_rank(lambda: where.extend([remote.url] if remote.saves() else []))
        return self.group.broadcast("".join(where[:1]))

    def _fetched(self, url: str) -> Path:
        """The newest checkpoint of another run's remote place, brought beside this run's own."""
        path = fetch_newest(RemoteFolder(url), self.root.with_name("fetched"), self.group)
        if path is None:
            raise ConfigError("there is no sound checkpoint; give the URL that a run had as checkpoint.remote")
        return path

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint of the run, unverified; local, not collective."""
        found = complete_checkpoints(self.root)
        return found[0][0] if found else None

    def clear_away(self) -> None:
        """Finish or undo what an earlier run was at when it was killed; a run with nothing left to save does it too.

        From here on this run is who writes to the remote place.

        Raises:
            RunError: A folder cannot be renamed or deleted, or the remote place cannot be written.
        """
        self.group.on_first_rank(lambda: settle(self.root))
        if self._uploads is not None:
            self._uploads.begin()

    def load(
        self,
        path: str | Path,
        engine: Stateful,
        *,
        names: Collection[str] | None = None,
        base: str | None = None,
        optimizer: bool = True,
    ) -> dict[str, Any]:
        """Read a checkpoint into the engine and return the saved `train_state`.

        Args:
            path: What `find` returned.
            engine: Prepared engine; its layout and number of ranks may differ from the saving one's.
            names: As for `save`.
            base: As for `save`.
            optimizer: Whether to read the optimizer's state too.

        Raises:
            ConfigError: The checkpoint is of another model, optimizer or base.
            RunError: A file is damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_kind(folder, manifest, names, base)
        model = engine.model_state()
        wanted = model if names is None else {name: tensor for name, tensor in model.items() if name in names}
        read_part(folder / "model", wanted, self.group, only=self._meant(wanted))
        engine.load_model_state(model)
        if optimizer:
            state = engine.optimizer_state()
            apart = take_apart(state)
            read_part(folder / "optimizer", apart, self.group, only=self._meant(apart))
            engine.load_optimizer_state(state)
            if isinstance(engine, WorkersState):
                load_workers(folder, engine, self.group, manifest.step)
        return self.train_state(folder)

    def _meant(self, live: Collection[str]) -> Callable[[str], bool]:
        """Return which names of a checkpoint this rank reads: all but those that other ranks have. A collective."""
        if not self._in_parts:
            return lambda name: True
        elsewhere = {name for names in gather_objects(sorted(live)) for name in names} - set(live)
        return lambda name: name not in elsewhere

    def train_state(self, path: str | Path) -> dict[str, Any]:
        """Return the saved `train_state` of a checkpoint that `find` returned, without its tensors."""
        return read_document(Path(path), "train_state.json")

    # Saving

    def _write(self, job: Job) -> None:
        self._writer.write(job)
        if self._uploads is not None:
            self._uploads.offer(step_folder(self.root, job.step))

    def _write_in_background(self, job: Job) -> None:
        try:
            try:
                for snapshot in job.parts.values():
                    snapshot.finish_host_copies()
            finally:
                job.copied.set()
            for snapshot in job.parts.values():
                snapshot.wait_for_device()
            self._write(job)
        except BaseException as error:  # noqa: BLE001 (handed to the next `save` or `wait`)
            self._error = error
