"""Saves that fail or are killed at every step, and what is left of them."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanmill.checkpoint import storage
from leanmill.checkpoint.manifest import verify
from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import RunError
from tests.checkpoint.fake import odd_tensors, same
from tests.checkpoint.saving import engine_of, manager_of, saved, steps_of


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    manager = manager_of(tmp_path, asynchronous=asynchronous)
    sound = saved(manager, 1)

    def full(file: Any, data: memoryview, digest: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_all", full)
        with pytest.raises(RunError, match=r"step-00000002 failed: the disk is full.*Free space") as caught:
            saved(manager, 2)
    assert "\n" not in str(caught.value)
    assert steps_of(manager) == [1]
    assert verify(sound) == []
    saved(manager, 3)
    assert steps_of(manager) == [1, 3]


def test_error_in_the_background_surfaces_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "record_file", lambda path: (_ for _ in ()).throw(RuntimeError("broken")))
        manager.save(1, engine_of(), {}, {})
        assert manager._thread is not None
        manager._thread.join()
    with pytest.raises(RunError, match="broken"):
        manager.save(2, engine_of(), {}, {})
    saved(manager, 3)
    assert steps_of(manager) == [3]


def test_a_failing_run_still_finishes_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = manager_of(tmp_path)
    manager.save(1, engine_of(), {}, {})
    manager.drain()
    assert verify(manager.root / "step-00000001") == []
    monkeypatch.setattr(storage, "record_file", lambda path: (_ for _ in ()).throw(RuntimeError("broken")))
    manager.save(2, engine_of(), {}, {})
    manager.drain()  # the run's own error is the one to raise
    assert "broken" in caplog.text
    manager.drain()


def test_a_save_that_waits_for_a_lost_rank_keeps_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager, comes_back = manager_of(tmp_path), threading.Event()
    monkeypatch.setattr(storage, "record_file", lambda path: comes_back.wait(30))
    manager.save(1, engine_of(), {}, {})
    manager.drain(0.05)
    assert "cannot end without the lost rank" in caplog.text
    comes_back.set()
    manager.drain()


def test_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    manager = manager_of(tmp_path, asynchronous=False)
    with pytest.raises(RunError, match=r"saving .*step-00000001 failed: .*checkpoints"):
        manager.save(1, engine_of(), {}, {})


@pytest.mark.parametrize("after_files", [0, 1, 2])
def test_kill_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_files: int) -> None:
    manager = manager_of(tmp_path)
    sound = saved(manager, 1)
    written = 0
    original: Callable[..., Any] = storage._write_all

    def die(file: Any, data: memoryview, digest: Any) -> int:
        nonlocal written
        original(file, data[: len(data) // 2], digest)
        if written == after_files * 12:  # a header and eleven tensors a file of the model
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        return original(file, data[len(data) // 2 :], digest)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(storage, "_write_all", die)
        manager_of(tmp_path, asynchronous=False).save(2, engine_of(), {}, {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed == (after_files < 2)
    second = manager_of(tmp_path)
    if killed:
        assert [p.name for p in second.root.iterdir() if p.suffix] == ["step-00000002.tmp"]
        assert second.find("auto") == sound
    saved(second, 3)
    assert not list(second.root.glob("*.tmp"))


_STEPS_ON_DISK = ("rename", "unlink", "rmdir", "mkdir", "fsync")


def _killed_at(run_dir: Path, number: int, **settings: Any) -> bool:
    """Save step 2 in a process that dies just before its `number`-th change on disk; return whether it died."""
    child = os.fork()
    if child == 0:
        done = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                if done == number:
                    os._exit(9)
                done += 1
                return original(*args, **kwargs)

            return call

        for name in _STEPS_ON_DISK:
            setattr(os, name, counted(getattr(os, name)))
        try:
            manager_of(run_dir, asynchronous=False, **settings).save(2, engine_of(12), {"step": 2}, {})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_kill_at_each_step_of_saving_again_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for number in range(100):
        run_dir = tmp_path / str(number)
        for step in (1, 2):
            saved(manager_of(run_dir), step)
        killed = _killed_at(run_dir, number)
        manager = manager_of(run_dir)
        path = manager.find("auto")
        assert path is not None
        assert path.name.startswith("step-00000002"), number
        assert verify(path) == []
        state = read_full_state(path)
        assert same(state, odd_tensors(2)) or same(state, odd_tensors(12)), number
        found.append(same(state, odd_tensors(12)))
        saved(manager, 3)
        assert {p.name for p in manager.root.iterdir()} == {"step-00000002", "step-00000003"}, number
        assert same(read_full_state(manager.root / "step-00000002"), state)
        if not killed:
            break
    assert not killed
    assert number > 15
    assert found == sorted(found)
    assert found[-1]
    assert not found[0]


def test_kill_at_each_step_of_pruning_leaves_what_was_kept(tmp_path: Path) -> None:
    for number in range(100):
        run_dir = tmp_path / str(number)
        for step in (0, 1):
            saved(manager_of(run_dir), step)
        killed = _killed_at(run_dir, number)
        second = manager_of(run_dir)
        path = second.find("auto")
        assert path is not None
        assert second._retention.damaged == set(), number
        saved(second, 3)
        assert {p.name for p in second.root.iterdir()} == {path.name, "step-00000003"}, number
        if not killed:
            break
    assert not killed


def test_what_a_killed_run_left_goes_without_another_save(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, keep_last=8)
    for step in (1, 2, 3, 4):
        saved(manager, step)
    root = manager.root
    (root / "step-00000001").rename(root / "step-00000001.gone")
    (root / "step-00000002").rename(root / "step-00000002.old")
    (root / "step-00000004").rename(root / "step-00000004.tmp")
    manager_of(tmp_path).clear_away()
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    manager_of(tmp_path / "new").clear_away()
    assert not (tmp_path / "new").exists()


def test_a_rename_that_fails_leaves_the_earlier_save_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(tmp_path, asynchronous=False)
    saved(manager, 1, engine_of(1))
    original = os.rename

    def fail(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp") and not str(target).endswith(".gone"):
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(RunError, match="earlier checkpoints are intact"):
        manager.save(1, engine_of(2), {}, {})
    assert steps_of(manager) == [1]
    assert same(read_full_state(manager.root / "step-00000001"), odd_tensors(1))
