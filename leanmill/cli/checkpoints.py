"""Naming checkpoints and models on the command line."""

from __future__ import annotations

from pathlib import Path

from leanmill.checkpoint.finding import locate
from leanmill.checkpoint.folders import is_passing
from leanmill.checkpoint.manifest import MANIFEST
from leanmill.core.errors import RunError


def resolve_checkpoint(given: str) -> Path:
    """Return the checkpoint folder that `given` means: itself, or the newest sound one of a run folder.

    A checkpoint named itself is returned as it is: whoever reads it compares its checksums.

    Raises:
        ConfigError: There is none.
        RunError: Each one of the run folder is damaged.
    """
    path = Path(given)
    if (path / MANIFEST).is_file() and not is_passing(path):
        return path
    found = locate(path).path
    if found is None:
        raise RunError(f"the checkpoints of {path} were deleted while they were looked at; run the command again")
    return found


def is_model_folder(path: Path) -> bool:
    """Whether `path` is a model of Hugging Face's form: runs and checkpoints have no config.json."""
    return (path / "config.json").is_file()


def resolve_model(given: str) -> Path:
    """Return the model folder that `given` is, or else the checkpoint that it means (`resolve_checkpoint`).

    Raises:
        ConfigError: There is none.
        RunError: Each checkpoint of the run folder is damaged.
    """
    return Path(given) if is_model_folder(Path(given)) else resolve_checkpoint(given)
