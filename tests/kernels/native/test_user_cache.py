"""Without a home folder, or with one that cannot be written, caches go elsewhere and say so."""

import logging
import os
import stat
from pathlib import Path

import pytest

from leanmill.kernels.native import user_cache as module
from leanmill.kernels.native.user_cache import user_cache


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    module._temporary.cache_clear()
    yield tmp_path
    module._temporary.cache_clear()


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_the_home_folder_is_used_where_there_is_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert user_cache() == tmp_path / ".cache" / "leanmill"
    assert user_cache().is_dir()
    assert caplog.records == []


@pytest.mark.parametrize(
    ("home", "reason"),
    [(no_home, "no home folder"), (lambda: Path("/dev/null/home"), "/dev/null/home"), (lambda: Path("/proc"), "/proc")],
)
def test_without_a_home_it_is_a_private_temporary_folder_said_once(home, reason, temporary, monkeypatch, caplog):
    monkeypatch.setattr(Path, "home", home)
    folder = user_cache()
    assert folder == user_cache() == temporary / f"leanmill-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert str(folder) in record.getMessage()


def test_a_folder_that_others_can_write_is_not_taken(temporary, monkeypatch):
    monkeypatch.setattr(Path, "home", no_home)
    (temporary / f"leanmill-{os.getuid()}").mkdir()
    (temporary / f"leanmill-{os.getuid()}").chmod(0o777)
    folder = user_cache()
    assert folder.parent == temporary
    assert folder.name != f"leanmill-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
