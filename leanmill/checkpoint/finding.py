"""Finding the checkpoint to read: the one way for resuming, evaluating, exporting and reporting. Imports no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from leanmill.checkpoint.folders import counting_folders, is_passing
from leanmill.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from leanmill.checkpoint.phases import MODEL, PHASES, phase_folders
from leanmill.core.errors import ConfigError, RunError


log = logging.getLogger(__name__)


class Agreement(Protocol):
    """Processes that must come to the same answer; each method is collective."""

    rank: int
    size: int

    def broadcast(self, text: str) -> str:
        """Return rank 0's `text` on every rank."""

    def gather(self, text: str) -> list[str]:
        """Return every rank's `text`, by rank."""

    def total(self, count: int) -> int:
        """Return the sum of `count` over the ranks."""


class Alone:
    """One process, which agrees with itself."""

    rank, size = 0, 1

    def broadcast(self, text: str) -> str:
        """Return `text`."""
        return text

    def gather(self, text: str) -> list[str]:
        """Return `text` alone."""
        return [text]

    def total(self, count: int) -> int:
        """Return `count`."""
        return count


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    path: Path | None
    """The checkpoint; None in a folder that has none at all."""
    skipped: dict[Path, str] = field(default_factory=dict)
    """Damaged checkpoints that were passed over, with the reason."""


def complete_checkpoints(root: Path) -> list[tuple[Path, Manifest]]:
    """Return folders below `root` with a readable manifest, newest first; nothing else is read."""
    return _read(root)[0]


def newest_sound(
    root: Path, group: Agreement | None = None, *, is_wanted: Callable[[Manifest], bool] = lambda manifest: True
) -> Found:
    """Return the newest checkpoint below `root` whose every file is as written, and say what was skipped.

    Args:
        root: Folder that holds `step-*` folders; it may be missing.
        group: Who searches together; the reading is shared out. None is this process alone.
        is_wanted: Which checkpoints count at all; the first rank is asked.

    Raises:
        RunError: There are checkpoints, and each is damaged.
    """
    group = group or Alone()
    complete, unreadable = _read(root)
    complete = [(path, manifest) for path, manifest in complete if is_wanted(manifest)]
    seen = {"complete": [str(path) for path, _ in complete], "unreadable": {str(p): e for p, e in unreadable.items()}}
    listed = json.loads(group.broadcast(json.dumps(seen)))
    skipped = {Path(path): problem for path, problem in listed["unreadable"].items()}
    newest = None
    for path in map(Path, listed["complete"]):
        if not (problem := problem_of(path, group)):
            newest = path
            break
        skipped[path] = problem
    if newest is None and skipped:
        raise RunError(
            f"every checkpoint in {root} is damaged ({next(iter(skipped.values()))}); "
            f"move them away to start over, or give another run_dir"
        )
    for path, problem in skipped.items() if group.rank == 0 else ():
        log.warning("skipping damaged checkpoint %s: %s", path, problem)
    return Found(path=newest, skipped=skipped)


def locate(given: str | Path, group: Agreement | None = None) -> Found:
    """Return the checkpoint that a path means: itself, or the newest sound one of a run folder, of its last phase.

    Args:
        given: A checkpoint, a run folder, or the `checkpoints` folder of one.
        group: As for `newest_sound`.

    Raises:
        ConfigError: There is no such folder, or no checkpoint in it.
        RunError: The named checkpoint is damaged or was never finished; of a run folder, all are.
    """
    group, path = group or Alone(), Path(given)
    # Folders may look different from another machine for a while: the first rank's view counts.
    path = Path(group.broadcast(str(next(reversed(phase_folders(path)), path))))
    meaning = group.broadcast(_meaning(path))
    if meaning == "nothing":
        raise ConfigError(
            f"no checkpoint at {path}: no such folder; give a run folder such as runs/quickstart, or a checkpoint "
            f"such as runs/quickstart/checkpoints/step-00000100"
        )
    if meaning == "empty" and (path / MODEL).is_dir():
        raise ConfigError(
            f"{path} ran passes only, so it holds no checkpoint; its model is {path / MODEL}, a Hugging Face folder"
        )
    if meaning == "empty":
        raise ConfigError(f"{path} holds no checkpoint (no checkpoints/step-*); give another folder, or train on")
    if meaning == "passing":
        raise RunError(f"{path} was never finished, or is being deleted; give its run folder for the newest sound one")
    if meaning != "checkpoint":
        return newest_sound(Path(meaning), group)
    if problem := problem_of(path, group):
        raise RunError(f"{path} cannot be used: {problem}")
    return Found(path=path)


def is_run(path: Path) -> bool:
    """Whether a folder is a run or a checkpoint of one, and no model as transformers saves it."""
    if not path.is_dir() or ((path / "config.json").is_file() and not (path / MANIFEST).is_file()):
        return False
    return (path / MANIFEST).is_file() or any((path / name).is_dir() for name in ("checkpoints", PHASES))


def _meaning(path: Path) -> str:
    """Return what a path is: `nothing`, `empty`, `passing`, `checkpoint`, or the folder that holds checkpoints."""
    if not path.is_dir():
        return "nothing"
    if path.name.startswith("step-") or (path / MANIFEST).is_file():
        return "passing" if is_passing(path) else "checkpoint"
    return next((str(root) for root in (path / "checkpoints", path) if counting_folders(root)), "empty")


def problem_of(path: Path, group: Agreement | None = None) -> str:
    """Return what is wrong with a checkpoint's files, equal on all ranks; empty when it is sound."""
    group = group or Alone()
    problems = verify(path, share=(group.rank, group.size))
    if not group.total(len(problems)):
        return ""
    return next(text for text in group.gather("; ".join(problems[:3])) if text)


def _read(root: Path) -> tuple[list[tuple[Path, Manifest]], dict[Path, str]]:
    """Return the folders with a readable manifest, newest first, and those without one with the reason."""
    complete, unreadable = [], {}
    for folder in counting_folders(root):
        try:
            complete.append((folder, read_manifest(folder)))
        except RunError as error:
            unreadable[folder] = str(error)
    return sorted(complete, key=lambda item: item[1].sequence, reverse=True), unreadable
