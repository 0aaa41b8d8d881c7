"""One run at a time in a run folder, whoever held it before and however that ended."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.core.errors import ConfigError, RunError
from leanmill.trainer.lock_holder import read_holder
from leanmill.trainer.run_lock import FILE_NAME, RunLock, exclusive, is_held
from tests.checkpoint.fake import FakeEngine
from tests.distributed import run_ranks


@contextmanager
def held_elsewhere(run_dir: Path, **options: float):
    """Another process holds the lock; yields its number."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            RunLock(run_dir, **options).acquire()
            os.write(writer, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(reader, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def killed_holder(run_dir: Path) -> int:
    with held_elsewhere(run_dir) as pid:
        pass
    return pid


def rewrite(run_dir: Path, *, seconds_ago: float = 0.0, **changes: object) -> None:
    """Change what the lock says, and when it was touched last."""
    path = run_dir / "run.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def left_over(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def test_a_second_run_is_refused_at_once(tmp_path):
    with held_elsewhere(tmp_path) as pid:
        started = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            RunLock(tmp_path).acquire()
        assert time.monotonic() - started < 1
        message = str(caught.value)
        assert f"run_dir={tmp_path} is in use: process {pid} on {os.uname().nodename}, since 20" in message
        assert f"kill {pid}" in message
        assert "\n" not in message
        assert left_over(tmp_path) == ["run.lock"]


def test_every_rank_of_the_second_run_is_refused(tmp_path):
    def enter() -> str:
        with pytest.raises(ConfigError) as caught, exclusive(tmp_path, torch.distributed.get_rank()):
            pass
        return str(caught.value)

    with held_elsewhere(tmp_path) as pid:
        messages = run_ranks(enter, 2, timeout_seconds=20)
    assert all(f"process {pid}" in message for message in messages)
    assert messages[0] == messages[1]


def test_a_dead_runs_lock_is_taken_over_with_a_line(tmp_path, caplog):
    pid = killed_holder(tmp_path)
    lock = RunLock(tmp_path)
    with caplog.at_level(logging.WARNING):
        lock.acquire()
    assert f"taking over run_dir={tmp_path} from process {pid}" in caplog.text
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert left_over(tmp_path) == []


def test_a_process_that_waits_to_be_collected_is_gone(tmp_path):
    with held_elsewhere(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()


def test_a_process_number_used_again_is_another_process(tmp_path):
    killed_holder(tmp_path)
    rewrite(tmp_path, pid=os.getpid())  # lives, but was started at another time
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("change", [{"machine": "another boot"}, {"machine": "another boot", "host": "node7"}])
def test_a_holder_that_cannot_be_asked_is_alive_while_it_touches_the_lock(tmp_path, caplog, change):
    with held_elsewhere(tmp_path):  # the same host name and even process number say nothing
        rewrite(tmp_path, **change)
        beating = threading.Timer(0.5, os.utime, [tmp_path / "run.lock"])
        beating.start()
        with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match="is in use: .*, and alive"):
            RunLock(tmp_path, silent_seconds=5).acquire()
        assert f"rm {tmp_path}/run.lock" in caplog.text
        assert left_over(tmp_path) == ["run.lock"]


def test_the_holder_touches_the_lock(tmp_path):
    with held_elsewhere(tmp_path, beat_seconds=0.1):
        rewrite(tmp_path, seconds_ago=1000)
        os.utime(tmp_path / "run.lock", (1, 1))
        time.sleep(0.5)
        assert time.time() - (tmp_path / "run.lock").stat().st_mtime < 0.5


def test_a_silent_holder_on_another_machine_is_taken_over(tmp_path, caplog):
    killed_holder(tmp_path)
    rewrite(tmp_path, host="node7", machine="another boot", seconds_ago=500)
    lock = RunLock(tmp_path)
    with caplog.at_level(logging.WARNING):
        lock.acquire()  # at once: it was silent for long enough
    lock.release()
    assert "on node7" in caplog.text
    assert "nothing was heard for 180 s" in caplog.text
    assert "waiting" not in caplog.text


def test_a_requeued_run_waits_for_a_silent_holder_and_goes_on(tmp_path, caplog):
    killed_holder(tmp_path)
    rewrite(tmp_path, host="node7", machine="another boot")
    lock, started = RunLock(tmp_path, silent_seconds=0.5), time.monotonic()
    with caplog.at_level(logging.WARNING):
        lock.acquire()
    assert 0.4 < time.monotonic() - started < 3
    assert "waiting up to" in caplog.text
    lock.release()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', "[]"])
def test_a_torn_lock_is_judged_by_its_age(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    os.utime(tmp_path / "run.lock", (1, 1))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert left_over(tmp_path) == []


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with held_elsewhere(tmp_path), pytest.raises(ConfigError, match="is in use"):
        RunLock(tmp_path).acquire()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert left_over(tmp_path) == []


def test_of_many_that_meet_a_dead_lock_one_enters(tmp_path):
    for number in range(6):
        run_dir = tmp_path / str(number)
        killed_holder(run_dir)
        gate, entered = os.pipe(), os.pipe()
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                try:
                    os.read(gate[0], 1)
                    RunLock(run_dir).acquire()
                    os.write(entered[1], b"x")
                    time.sleep(30)
                finally:
                    os._exit(0)
            children.append(child)
        os.write(gate[1], b"g" * 6)
        alive = list(children)
        deadline = time.monotonic() + 20
        while len(alive) > 1 and time.monotonic() < deadline:
            alive = [child for child in alive if os.waitpid(child, os.WNOHANG) == (0, 0)]
            time.sleep(0.01)
        assert len(alive) == 1
        assert os.read(entered[0], 9) == b"x"
        assert json.loads((run_dir / "run.lock").read_text())["pid"] == alive[0]
        os.kill(alive[0], signal.SIGKILL)
        os.waitpid(alive[0], 0)


def test_a_lock_taken_in_the_meantime_is_put_back(tmp_path):
    killed_holder(tmp_path)
    judged = read_holder(tmp_path / "run.lock")[0]
    second = RunLock(tmp_path)
    second.acquire()
    slow = RunLock(tmp_path)
    held = os.stat(tmp_path / "run.lock")
    assert not slow._move_aside(judged)  # it saw the dead run's lock before the second one came
    assert os.stat(tmp_path / "run.lock").st_ctime_ns == held.st_ctime_ns, "it was never away"
    assert not slow._rename(judged)  # where the file system locks no folders
    second.check()
    second.release()
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_released_however_the_run_ends(tmp_path, error):
    def run() -> None:
        with exclusive(tmp_path, 0):
            assert left_over(tmp_path) == ["run.lock"]
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert left_over(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "run lock"]


def test_a_folder_made_for_a_run_that_wrote_nothing_goes(tmp_path):
    with exclusive(tmp_path / "a/b", 0):
        pass
    assert left_over(tmp_path / "a") == []


def test_a_run_that_lost_its_lock_writes_no_checkpoint(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    manager = CheckpointManager(tmp_path, CheckpointConfig(), before_write=lock.check)
    engine = FakeEngine({"w": torch.ones(2)})
    manager.save(1, engine, {}, {})
    manager.wait()
    mine = read_holder(lock.path)[0]
    lock.path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(mine, token="another", host="node7"))))
    manager.save(2, engine, {}, {})
    with pytest.raises(RunError, match=r"taken over by another run \(process .* on node7"):
        manager.wait()
    assert [path.name for path in manager.root.iterdir()] == ["step-00000001"]
    lock.release()
    assert lock.path.exists()


def test_a_lock_removed_by_hand_comes_back(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.path.unlink()
    lock.check()
    assert lock.path.exists()
    lock.release()
    assert left_over(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ConfigError, match=r"cannot be written: .*give a folder that can"):
            RunLock(path).acquire()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="disk is full"):
        RunLock(tmp_path / "run").acquire()


def test_is_held_while_its_process_lives(tmp_path):
    assert not is_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert is_held(tmp_path)
    lock.release()
    assert not is_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    holder = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(holder | {"started": "another start"}))
    assert not is_held(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps(holder | {"machine": "another"}))
    assert is_held(tmp_path)
    os.utime(tmp_path / FILE_NAME, (0, 0))
    assert not is_held(tmp_path)
    lock.release()
