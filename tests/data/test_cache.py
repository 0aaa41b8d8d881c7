"""Building once, whoever asks."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from leanmill.core.errors import RunError
from leanmill.data.cache import cached_folder, fingerprint


def _slow_build(root, log):
    def build(folder):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (folder / "x").write_text("content")

    return (cached_folder(root, "kind", "key", build) / "x").read_text()


def _ask(root, log, queue):
    queue.put(_slow_build(root, log))


def test_of_many_processes_one_builds_and_all_read(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(tmp_path, tmp_path / "log", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == ["content"] * 4
    for process in processes:
        process.join()
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_leaves_nothing_that_counts(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_slow_build, args=(tmp_path, tmp_path / "log"))
    process.start()
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "kind" / "key").exists()
    assert _slow_build(tmp_path, tmp_path / "log") == "content"
    assert (tmp_path / "log").read_text() == "built\nbuilt\n"
    assert sorted(p.name for p in (tmp_path / "kind").iterdir()) == ["key", "key.lock"]


def test_a_failed_build_leaves_nothing_and_passes_the_error_on(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder(tmp_path, "kind", "key", build)
    assert [p.name for p in (tmp_path / "kind").iterdir()] == ["key.lock"]


def test_a_full_disk_is_one_line_with_the_remedy(tmp_path):
    def build(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"No space left.*data\.cache_dir") as caught:
        cached_folder(tmp_path, "kind", "key", build)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_content_and_not_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
