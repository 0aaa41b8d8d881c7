"""One way to find the checkpoint that a path means."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import complete_checkpoints, locate, newest_sound
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.cli.checkpoints import resolve_checkpoint
from leanmill.core.errors import ConfigError, RunError
from tests.checkpoint.fake import FakeEngine


def _save(run_dir: Path, *steps: int) -> list[Path]:
    manager = CheckpointManager(run_dir, CheckpointConfig(asynchronous=False, keep_last=9))
    for step in steps:
        manager.save(step, FakeEngine({"w": torch.full((4,), float(step))}), {"step": step}, {})
    return [manager.root / f"step-{step:08d}" for step in steps]


@pytest.fixture(params=[locate, resolve_checkpoint], ids=["resume", "command line"])
def find(request):
    def call(path):
        found = request.param(str(path))
        return found if isinstance(found, Path) else found.path

    return call


def _damage(path: Path) -> None:
    file = path / "model/00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def test_the_newest_is_by_order_of_saving(find, tmp_path):
    _save(tmp_path, 10, 20)
    (branch,) = _save(tmp_path, 15)
    assert find(tmp_path) == find(tmp_path / "checkpoints") == find(branch) == branch


def test_a_folder_being_written_or_deleted_is_never_taken(find, tmp_path):
    sound, written, doomed = _save(tmp_path, 1, 2, 3)
    written.rename(written.with_suffix(".tmp"))
    doomed.rename(doomed.with_suffix(".gone"))
    assert find(tmp_path) == sound
    for path in (written.with_suffix(".tmp"), doomed.with_suffix(".gone")):
        with pytest.raises(RunError, match="never finished, or is being deleted"):
            find(path)


def test_a_displaced_folder_counts_while_its_successor_is_missing(find, tmp_path):
    first, second = _save(tmp_path, 1, 2)
    displaced = second.rename(second.with_suffix(".old"))
    assert find(tmp_path) == find(displaced) == displaced
    first.rename(second)
    assert find(tmp_path) == second


def test_a_copy_under_another_name_is_left_alone(find, tmp_path):
    first, second = _save(tmp_path, 1, 2)
    kept = second.rename(second.with_suffix(".bak"))
    assert find(tmp_path) == first
    assert find(kept) == kept
    assert find(kept.rename(tmp_path / "model-v1.5")) == tmp_path / "model-v1.5"


def test_a_damaged_newest_falls_back_and_says_so(find, tmp_path, caplog):
    first, second, third = _save(tmp_path, 1, 2, 3)
    _damage(second)
    (third / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path) == first
    assert f"skipping damaged checkpoint {second}" in caplog.text
    assert f"skipping damaged checkpoint {third}" in caplog.text
    _damage(first)
    with pytest.raises(RunError, match="every checkpoint in .* is damaged"):
        find(tmp_path)


def test_nothing_there(find, tmp_path):
    assert newest_sound(tmp_path / "checkpoints").path is None
    assert complete_checkpoints(tmp_path / "checkpoints") == []
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        find(tmp_path / "missing")


def test_finding_needs_no_torch():
    code = "import sys, leanmill.cli.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
