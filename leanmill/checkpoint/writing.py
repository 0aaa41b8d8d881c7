"""Writing one checkpoint: its tensors, its documents and last the manifest, by which it counts."""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from leanmill.checkpoint.finding import complete_checkpoints
from leanmill.checkpoint.folders import WRITING, begin, publish, settle, step_folder
from leanmill.checkpoint.group import SaveGroup, message_of, one_process_is_meant
from leanmill.checkpoint.manifest import FileRecord, Manifest, record_file, sync_folder, write_json, write_manifest
from leanmill.checkpoint.retention import Retention
from leanmill.checkpoint.snapshot import Snapshot, SnapshotPlanner
from leanmill.checkpoint.storage import SafetensorsWriter
from leanmill.core.errors import RunError


_VERSIONED = ("leanmill", "torch", "transformers", "safetensors", "peft", "torchao", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a save writes, fixed at the moment `save` was called."""

    step: int
    parts: dict[str, Snapshot]
    documents: dict[str, Any]
    score: float | None
    partial: bool
    base: str | None
    copied: threading.Event = field(default_factory=threading.Event)
    """Set once the host's copies are done."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes jobs below `root`; `write` is collective."""

    root: Path
    group: SaveGroup
    retention: Retention
    before_write: Callable[[], None]
    """Called on rank 0 before anything is written; a RunError from it ends the save."""
    highest_elsewhere: Callable[[], int]
    """Called on rank 0: the highest sequence of saves that lie elsewhere; those to come count as newer."""

    def write(self, job: Job) -> None:
        """Write a checkpoint; it counts once everything is there.

        Raises:
            RunError: A rank failed; earlier checkpoints are as they were.
        """
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
                f"saving {folder.with_suffix('')} failed: {message_of(error)}; earlier checkpoints are intact. "
                f"Free space there or set run_dir to another disk, then run the same command again"
            ) from error

    def _write_part(self, folder: Path, part: str, snapshot: Snapshot) -> dict[str, FileRecord]:
        one_process_is_meant()
        writer = SafetensorsWriter(folder / part)
        dcp.save(
            {},
            storage_writer=writer,
            planner=SnapshotPlanner(snapshot),
            process_group=self.group.group,
            no_dist=self.group.group is None,
        )
        return {f"{part}/{name}": record for name, record in writer.files.items()}

    def _finish(self, folder: Path, job: Job, files: dict[str, FileRecord]) -> None:
        for name, document in job.documents.items():
            write_json(folder / name, document)
            files[name] = record_file(folder / name)
        present = complete_checkpoints(self.root)
        manifest = Manifest(
            step=job.step,
            sequence=1 + max(self.highest_elsewhere(), *(m.sequence for _, m in present), 0),
            score=job.score,
            partial=job.partial,
            base=job.base,
            files=files,
        )
        write_manifest(folder, manifest)
        sync_folder(folder)
        publish(folder)
        self.retention.apply(written=folder.with_suffix(""))


@functools.cache
def versions() -> dict[str, str]:
    """Return what ran, for the record: names of packages and their versions."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
