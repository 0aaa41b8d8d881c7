"""Naming a checkpoint on the command line."""

from __future__ import annotations

from pathlib import Path

from leanmill.core.errors import ConfigError


def resolve_checkpoint(given: str) -> Path:
    """Return the checkpoint folder that `given` means: itself, or the newest complete one of a run_dir.

    Raises:
        ConfigError: There is none.
    """
    path = Path(given)
    if (path / "manifest.json").is_file():
        return path
    complete = sorted(p.parent for p in path.glob("checkpoints/step-*/manifest.json"))
    if complete:
        return complete[-1]
    if not path.exists():
        raise ConfigError(f"no checkpoint at {path}; name a folder such as runs/quickstart/checkpoints/step-00000100")
    raise ConfigError(f"{path} holds no complete checkpoint (no manifest.json); name another or train on")
