"""Managers and saves for the tests of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from tests.checkpoint.fake import FakeEngine, odd_tensors


def manager_of(run_dir: Path, **settings: Any) -> CheckpointManager:
    return CheckpointManager(run_dir, CheckpointConfig(**settings))


def engine_of(seed: int = 0) -> FakeEngine:
    optimizer = {"model.embed.weight/exp_avg": torch.randn(7, 5), "model.embed.weight/step": torch.tensor(3.0)}
    return FakeEngine(odd_tensors(seed), optimizer)


def saved(manager: CheckpointManager, step: int, engine: FakeEngine | None = None, **options: Any) -> Path:
    manager.save(step, engine or engine_of(step), {"step": step}, {"name": "run"}, **options)
    manager.wait()
    return manager.root / f"step-{step:08d}"


def steps_of(manager: CheckpointManager) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in manager.root.iterdir())


def truncate(path: Path) -> Path:
    """Cut a checkpoint's tensors short; return the file."""
    file = path / "model/00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 3)
    return file
