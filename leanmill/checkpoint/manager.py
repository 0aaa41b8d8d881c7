"""Saving, finding, loading and pruning the checkpoints of a run.

A save goes into `step-XXXXXXXX.tmp`; every file is flushed, the manifest comes last, and a rename
makes the folder count, see `folders.py`. Whatever kills the run in between leaves the earlier
checkpoints as they were. All ranks must see the same `run_dir`.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from leanmill.checkpoint.compare import compare
from leanmill.checkpoint.components import take_apart
from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import complete_checkpoints, locate, newest_sound
from leanmill.checkpoint.folders import WRITING, begin, publish, remove, settle, step_folder
from leanmill.checkpoint.group import SaveGroup, describe
from leanmill.checkpoint.manifest import (
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
    sync_folder,
    write_json,
    write_manifest,
)
from leanmill.checkpoint.reading import read_document, read_index
from leanmill.checkpoint.snapshot import Snapshot, SnapshotPlanner, Snapshots
from leanmill.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.quiet import ignore_warning
from leanmill.core.redact import redact_tree


if TYPE_CHECKING:
    from leanmill.parallel.engine import Engine


log = logging.getLogger(__name__)
_VERSIONED = ("leanmill", "torch", "transformers", "safetensors", "peft", "torchao", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything a save writes, fixed at the moment `save` was called."""

    step: int
    parts: dict[str, Snapshot]
    documents: dict[str, Any]
    score: float | None
    partial: bool
    base: str | None
    copied: threading.Event = field(default_factory=threading.Event)
    """Set once the host's copies are done."""


class CheckpointManager:
    """The checkpoints of one run. Construction, `save`, `wait`, `find` and `load` are collective.

    Args:
        run_dir: Folder of the run; checkpoints lie in its `checkpoints/`.
        config: When and what to keep.
        overlap: The caller promises to call `finish_copies` before anything writes trained
            parameters or optimizer state after a `save`. Then those are copied beside the next
            forward and backward passes instead of while `save` runs.
        before_write: Called on rank 0 before a save writes anything; a RunError from it ends the save.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        *,
        overlap: bool = False,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.config = config
        self.overlap = overlap
        self.before_write = before_write
        self.group = SaveGroup()
        self._snapshots = Snapshots(self.group.rank)
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        self._error: BaseException | None = None
        self._damaged: set[Path] = set()

    def save(
        self,
        step: int,
        engine: Engine,
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
            engine: Whose model and optimizer to save.
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
        model = engine.model_state()
        kept = model if names is None else {name: tensor for name, tensor in model.items() if name in names}
        states = {"model": kept, "optimizer": take_apart(engine.optimizer_state())}
        trained = {name.rpartition("/")[0] for name in states["optimizer"]}
        copy = self.config.asynchronous
        put_off = {"model": trained.__contains__, "optimizer": lambda _: True} if self.overlap else {}
        job = _Job(
            step=step,
            parts={
                part: self._snapshots.take(part, state, copy=copy, put_off=put_off.get(part, lambda _: False))
                for part, state in states.items()
            },
            documents={
                "train_state.json": json.loads(json.dumps(train_state)),
                "recipe.json": redact_tree(recipe_json),
                "versions.json": _versions(),
            },
            score=score,
            partial=names is not None,
            base=base,
        )
        if copy:
            self._job = job
            self._thread = threading.Thread(target=self._write_in_background, args=(job,), name="checkpoint")
            self._thread.start()
            if not self.overlap:
                self.finish_copies()
        else:
            self._write(job)
        return time.perf_counter() - started

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

    def drain(self) -> None:
        """Wait for the save in flight without raising: for a run that is failing for another reason."""
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
            found = newest_sound(self.root, self.group)
            self._damaged |= {path.with_suffix("") for path in found.skipped}
            return found.path
        if resume == "never":
            present = self.latest()
            if self.group.broadcast(str(present or "")):
                raise ConfigError(
                    f"checkpoint.resume=never, but {self.root} has checkpoints; give another run_dir, "
                    f"or type checkpoint.resume=auto to continue"
                )
            return None
        try:
            return locate(resume, self.group).path
        except (ConfigError, RunError) as error:
            raise type(error)(f"checkpoint.resume={resume}: {error}") from error

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint of the run, unverified; local, not collective."""
        found = complete_checkpoints(self.root)
        return found[0][0] if found else None

    def clear_away(self) -> None:
        """Finish or undo what an earlier run was at when it was killed; a run with nothing left to save does it too.

        Raises:
            RunError: A folder cannot be renamed or deleted.
        """
        self.group.on_first_rank(lambda: settle(self.root))

    def load(
        self, path: str | Path, engine: Engine, *, names: Collection[str] | None = None, base: str | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into the engine and return the saved `train_state`.

        Args:
            path: What `find` returned.
            engine: Prepared engine; its layout and number of ranks may differ from the saving one's.
            names: As for `save`.
            base: As for `save`.

        Raises:
            ConfigError: The checkpoint is of another model, optimizer or base.
            RunError: A file is damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        _check_kind(folder, manifest, names, base)
        model = engine.model_state()
        wanted = model if names is None else {name: tensor for name, tensor in model.items() if name in names}
        self._read_part(folder / "model", wanted)
        engine.load_model_state(model)
        optimizer = engine.optimizer_state()
        self._read_part(folder / "optimizer", take_apart(optimizer))
        engine.load_optimizer_state(optimizer)
        return self.train_state(folder)

    def train_state(self, path: str | Path) -> dict[str, Any]:
        """Return the saved `train_state` of a checkpoint that `find` returned, without its tensors."""
        return read_document(Path(path), "train_state.json")

    # Loading

    def _read_part(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Read a part into the tensors of `state`, in place."""
        problem = compare(read_index(folder), state, folder)
        if problem:
            raise ConfigError(problem)
        error = ""
        try:
            _quiet()
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            # Every rank plans its own reads: nothing needs to be agreed, so nothing is sent.
            dcp.load(dict(state), storage_reader=SafetensorsReader(folder), planner=planner, no_dist=True)
        except (CheckpointException, RunError, OSError) as failure:
            error = _message(failure)
        if self.group.total(bool(error)):
            raise RunError(error or f"{folder}: another rank failed to read it")

    # Saving

    def _write_in_background(self, job: _Job) -> None:
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

    def _write(self, job: _Job) -> None:
        self.group.on_first_rank(self.before_write)
        folder = step_folder(self.root, job.step).with_suffix(WRITING)
        try:
            self.group.on_first_rank(lambda: begin(folder))
            files: dict[str, FileRecord] = {}
            for part, snapshot in job.parts.items():
                files |= self._write_part(folder, part, snapshot)
            self.group.on_first_rank(lambda: self._finish(folder, job, files))
        except (Exception, CheckpointException) as error:
            if self.group.rank == 0:
                with suppress(OSError):
                    settle(self.root)
            raise RunError(
                f"saving {folder.with_suffix('')} failed: {_message(error)}; earlier checkpoints are intact. "
                f"Free space there or set run_dir to another disk, then run the same command again"
            ) from error

    def _write_part(self, folder: Path, part: str, snapshot: Snapshot) -> dict[str, FileRecord]:
        _quiet()
        writer = SafetensorsWriter(folder / part)
        dcp.save(
            {},
            storage_writer=writer,
            planner=SnapshotPlanner(snapshot),
            process_group=self.group.group,
            no_dist=self.group.group is None,
        )
        return {f"{part}/{name}": record for name, record in writer.files.items()}

    def _finish(self, folder: Path, job: _Job, files: dict[str, FileRecord]) -> None:
        for name, document in job.documents.items():
            write_json(folder / name, document)
            files[name] = record_file(folder / name)
        present = complete_checkpoints(self.root)
        manifest = Manifest(
            step=job.step,
            sequence=1 + max((m.sequence for _, m in present), default=0),
            score=job.score,
            partial=job.partial,
            base=job.base,
            files=files,
        )
        write_manifest(folder, manifest)
        sync_folder(folder)
        publish(folder)
        self._damaged.discard(folder.with_suffix(""))
        self._prune()

    def _prune(self) -> None:
        """Remove what need not stay. Runs when the newest checkpoint is complete."""
        present = complete_checkpoints(self.root)
        sound = [(path, manifest) for path, manifest in present if path not in self._damaged]
        keep = {path for path, _ in sound[: self.config.keep_last]}
        scored = [(manifest.score, path) for path, manifest in sound if manifest.score is not None]
        if self.config.keep_best and scored:
            keep.add(min(scored)[1])
        for path, _ in present:
            if path not in keep:
                remove(path)


def _check_kind(folder: Path, manifest: Manifest, names: Collection[str] | None, base: str | None) -> None:
    if manifest.partial != (names is not None):
        held, asked = ("only the trained parameters", "all") if manifest.partial else ("all", "only the trained")
        raise ConfigError(
            f"{folder} holds {held}, this run saves {asked} parameters: their techniques differ; "
            f"use the recipe in {folder}/recipe.json, or another run_dir"
        )
    if manifest.base is not None and base is not None and manifest.base != base:
        raise ConfigError(
            f"{folder} was trained on another base model (fingerprint {manifest.base[:12]}, this run's is "
            f"{base[:12]}); set model.path or model.config and seed as in {folder}/recipe.json"
        )


def _message(error: BaseException) -> str:
    """One line about what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return describe(cause) + (f" (rank {rank})" if rank else "")
    return describe(error)


def _quiet() -> None:
    # Torch warns whenever one process saves or loads alone, which is what is asked for here.
    ignore_warning("torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
