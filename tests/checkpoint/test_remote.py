"""Copies of checkpoints in an object store: brought, kept, fetched, and what happens when the store fails."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from leanmill.checkpoint import uploads
from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import Alone
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.manifest import Manifest
from leanmill.checkpoint.remote import RemoteFolder
from leanmill.core.errors import ConfigError, RunError
from tests.checkpoint.fake import FakeEngine, odd_tensors, same, zeros_of
from tests.distributed import run_ranks


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store/run" if request.param == "file" else f"memory://{tmp_path.name}/run"


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store/run"


def _manager(run_dir: Path, url: str, **settings: Any) -> CheckpointManager:
    manager = CheckpointManager(run_dir, CheckpointConfig(**settings), remote=url)
    if settings.get("resume", "auto") == "auto":
        manager.found = manager.find("auto")  # type: ignore[attr-defined]
        manager.clear_away()
    return manager


def _save(manager: CheckpointManager, step: int, **options: Any) -> FakeEngine:
    engine = FakeEngine(odd_tensors(step))
    manager.save(step, engine, {"step": step}, {"name": "run"}, **options)
    manager.wait()
    return engine


def _saves(url: str) -> list[tuple[str, Manifest]]:
    return RemoteFolder(url).saves()


def _there(url: str) -> list[int]:
    return sorted(manifest.step for _, manifest in _saves(url))


def _here(manager: CheckpointManager) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in manager.root.iterdir())


def _restored(manager: CheckpointManager) -> tuple[dict[str, Any], dict[str, Any]]:
    engine = FakeEngine(zeros_of(odd_tensors()))
    return manager.load(manager.found, engine), engine.model  # type: ignore[attr-defined]


@pytest.mark.parametrize(("url", "said"), [("s3://b/x", r"'leanmill\[s3\]'"), ("gs://b/x", r"'fsspec\[gs\]'")])
def test_a_store_whose_package_is_missing_is_named_with_the_pip_line(url: str, said: str, monkeypatch: Any) -> None:
    import fsspec.core

    def missing(url: str) -> Any:
        raise ImportError("Install it to access that")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=f"Install it to access that; type pip install {said}"):
        RemoteFolder(url)


def test_a_run_goes_on_from_the_store_where_its_folder_is_lost(url: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "lost", url)
    _save(manager, 1)
    saved = _save(manager, 2)
    manager.close()
    assert _there(url) == [1, 2]
    shutil.rmtree(tmp_path / "lost")
    manager = _manager(tmp_path / "new", url)
    assert manager.found == manager.root / "step-00000002"  # type: ignore[attr-defined]
    state, model = _restored(manager)
    assert state == {"step": 2}
    assert same(model, saved.model)
    _save(manager, 3)
    manager.close()
    assert _there(url) == [2, 3]


def test_the_newest_of_both_places_counts(store: str, tmp_path: Path) -> None:
    first = _manager(tmp_path / "a", store)
    _save(first, 1)
    first.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _save(first, 2)
    first.close()
    assert _manager(tmp_path / "b", store).found.name == "step-00000002"  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "store")
    later = _manager(tmp_path / "b", store)
    assert later.found.name == "step-00000002"  # type: ignore[attr-defined]
    later.close()
    assert _there(store) == [2], "what the store lost is brought again at the start"


def test_a_damaged_folder_is_made_good_from_the_store(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    saved = _save(manager, 1)
    manager.close()
    victim = next((manager.root / "step-00000001" / "model").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    again = _manager(tmp_path / "a", store)
    assert same(_restored(again)[1], saved.model)


def test_a_damaged_copy_is_passed_over(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = _manager(tmp_path / "a", store)
    saved = _save(manager, 1)
    manager.close()
    _save(manager, 2)
    manager.close()
    victim = next((tmp_path / "store/run/step-00000002-2/model").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    shutil.rmtree(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        again = _manager(tmp_path / "a", store)
    assert "skipping damaged checkpoint" in caplog.text
    assert "step-00000002-2" in caplog.text
    assert same(_restored(again)[1], saved.model)


def test_those_stay_there_that_stay_here(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path, store, keep_steps=[2])
    for step, score in enumerate([5.0, 1.0, 4.0, 3.0, 2.0], start=1):
        _save(manager, step, score=score)
        manager.close()
    assert _there(store) == _here(manager) == [2, 4, 5]


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A store that takes some files and then refuses so many."""
    state = {"takes": 10**9, "refuses": 0, "asked": 0}
    put = RemoteFolder.put

    def refuse(self: RemoteFolder, source: Path, name: str) -> None:
        state["asked"] += 1
        state["takes"] -= 1
        if state["takes"] < 0 and state["refuses"] > 0:
            state["refuses"] -= 1
            raise ConnectionError("the store is away")
        put(self, source, name)

    monkeypatch.setattr(RemoteFolder, "put", refuse)
    monkeypatch.setattr(uploads, "_FIRST_PAUSE_SECONDS", 0.0)
    return state


def test_a_store_that_vanishes_costs_nothing(
    store: str, tmp_path: Path, refusing: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    manager = _manager(tmp_path / "a", store)
    refusing.update(takes=2, refuses=3)
    _save(manager, 1)
    manager._uploads._join()  # type: ignore[union-attr]
    assert refusing["refuses"] == 0, "each file is tried three times"
    assert "step-00000001 was not brought to" in caplog.text
    assert "ConnectionError: the store is away; it stays on this machine" in caplog.text
    assert _there(store) == []
    assert RemoteFolder(store).names() == [], "the half of it is gone"
    assert _here(manager) == [1]
    _save(manager, 2)
    manager.close()
    assert _there(store) == [2]
    assert RemoteFolder(store).names() == ["step-00000002-2"]


def test_a_store_that_comes_back_gets_the_newest_at_the_end(
    store: str, tmp_path: Path, refusing: dict[str, int]
) -> None:
    manager = _manager(tmp_path / "a", store)
    refusing.update(takes=0, refuses=3)
    _save(manager, 1)
    manager.close()
    assert _there(store) == [1]


def test_a_short_failure_is_overcome(store: str, tmp_path: Path, refusing: dict[str, int]) -> None:
    manager = _manager(tmp_path / "a", store)
    refusing.update(takes=1, refuses=2)
    _save(manager, 1)
    manager._uploads._join()  # type: ignore[union-attr]
    assert _there(store) == [1]


def test_a_save_beside_an_upload_does_not_wait_and_the_last_one_arrives(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, put = threading.Event(), RemoteFolder.put

    def slow(self: RemoteFolder, source: Path, name: str) -> None:
        assert go_on.wait(60)
        put(self, source, name)

    monkeypatch.setattr(RemoteFolder, "put", slow)
    manager = _manager(tmp_path, store)
    for step in range(1, 6):
        _save(manager, step)
    assert _here(manager) == [1, 4, 5], "what is on its way is not deleted"
    go_on.set()
    manager.close()
    assert _there(store) == [1, 5]
    _save(manager, 6)
    manager.close()
    assert _here(manager) == _there(store) == [5, 6]


def test_whoever_began_last_writes(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = _manager(tmp_path / "a", store)
    _save(first, 1)
    first.close()
    second = _manager(tmp_path / "b", store)
    _save(first, 2)
    first.close()
    assert "another run has begun to write to" in caplog.text
    assert _there(store) == [1]
    _save(second, 3)
    second.close()
    assert _there(store) == [1, 3]
    assert _here(first) == [1, 2]


def test_a_run_that_goes_back_writes_over_nothing_and_is_the_newest(store: str, tmp_path: Path) -> None:
    """Its folder is older than the place: the same steps come again, with other weights."""
    first = _manager(tmp_path / "a", store)
    _save(first, 1)
    first.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _save(first, 2)
    _save(first, 3)
    first.close()
    before = {name: (tmp_path / "store/run" / name / "manifest.json").read_bytes() for name, _ in _saves(store)}
    back = _manager(tmp_path / "b", store, resume=str(tmp_path / "b/checkpoints/step-00000001"))
    back.clear_away()
    back.close()
    assert {name for name, _ in _saves(store)} == set(before), "what is older than the newest there is not brought"
    engine = FakeEngine(odd_tensors(20))
    back.save(2, engine, {"step": 2}, {"name": "run"})
    back.close()
    newest, manifest = _saves(store)[0]
    assert newest not in before
    assert (manifest.step, manifest.sequence) == (2, 4)
    assert all(
        (tmp_path / "store/run" / name / "manifest.json").read_bytes() == before[name]
        for name, _ in _saves(store)
        if name in before
    )
    assert same(_restored(_manager(tmp_path / "c", store))[1], engine.model)


def test_a_damaged_folder_is_not_brought(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    _save(manager, 1)
    manager.close()
    manager._uploads._is_taken = True  # type: ignore[union-attr]
    _save(manager, 2)
    victim = next((manager.root / "step-00000002" / "model").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    again = _manager(tmp_path / "a", store)
    again.close()
    assert _there(store) == [1]


def test_a_folder_made_good_stays_like_any_other(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    for step in (1, 2):
        _save(manager, step)
        manager.close()
    victim = next((manager.root / "step-00000002" / "model").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    again = _manager(tmp_path / "a", store)
    _save(again, 3)
    again.close()
    assert _here(again) == [2, 3]


def test_a_connection_that_fails_while_fetching_loses_no_steps(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = _manager(tmp_path / "a", store)
    for step in (1, 2):
        _save(manager, step)
        manager.close()
    get, failures = RemoteFolder.get, iter(range(5))

    def unsteady(self: RemoteFolder, name: str, target: Path) -> None:
        if "step-00000002" in name and next(failures, None) is not None:
            raise ConnectionError("reset by peer")
        get(self, name, target)

    monkeypatch.setattr(RemoteFolder, "get", unsteady)
    monkeypatch.setattr(uploads, "_FIRST_PAUSE_SECONDS", 0.0)
    with pytest.raises(RunError, match="step-00000002-2 failed: ConnectionError: reset by peer; put it right"):
        _manager(tmp_path / "b", store)
    assert _manager(tmp_path / "b", store).found.name == "step-00000002"  # type: ignore[attr-defined]


def test_a_store_that_does_not_give_manifests_is_said(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = _manager(tmp_path / "a", store)
    _save(manager, 1)
    manager.close()

    def away(self: RemoteFolder, name: str) -> bytes:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(RemoteFolder, "read", away)
    with pytest.raises(RunError, match="cannot be read: ConnectionError: reset by peer; put it right"):
        _manager(tmp_path / "b", store)


def test_what_arrived_is_not_said_to_be_missing_where_tidying_fails(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(self: RemoteFolder, name: str) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(RemoteFolder, "delete_save", away)
    manager = _manager(tmp_path / "a", store)
    for step in (1, 2, 3):
        _save(manager, step)
        manager.close()
    assert "was not brought" not in caplog.text
    assert "was not tidied after step-00000003-3" in caplog.text


def test_a_place_that_was_emptied_is_filled_again(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    _save(manager, 1)
    manager.close()
    shutil.rmtree(tmp_path / "store")
    _save(manager, 2)
    manager.close()
    assert _there(store) == [2]


def test_another_run_starts_from_a_url(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    saved = _save(manager, 1)
    manager.close()
    other = CheckpointManager(tmp_path / "b", CheckpointConfig())
    engine = FakeEngine(zeros_of(odd_tensors()))
    path = other.find(store)
    assert path == tmp_path / "b/fetched/step-00000001"
    other.load(path, engine)
    assert same(engine.model, saved.model)
    assert other.latest() is None
    with pytest.raises(ConfigError, match="there is no sound checkpoint; give the URL that a run had"):
        other.find(f"file://{tmp_path}/nothing")


def test_never_refuses_a_store_that_has_checkpoints(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    _save(manager, 1)
    manager.close()
    with pytest.raises(ConfigError, match=r"resume=never, but file://.*/store/run has checkpoints"):
        CheckpointManager(tmp_path / "b", CheckpointConfig(), remote=store).find("never")


def test_a_store_that_cannot_be_used_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        CheckpointManager(tmp_path, CheckpointConfig(), remote="nosuch://bucket/run")
    with pytest.raises(ValueError, match="give a URL, e.g. s3://bucket"):
        CheckpointConfig(remote="bucket/run")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(RunError, match="or type checkpoint.remote=null"):
        _manager(tmp_path / "a", f"file://{blocked}/run")


def test_a_copy_cannot_name_files_outside_of_itself(store: str, tmp_path: Path) -> None:
    manager = _manager(tmp_path / "a", store)
    _save(manager, 1)
    manager.close()
    path = tmp_path / "store/run/step-00000001-1/manifest.json"
    raw = json.loads(path.read_text())
    raw["files"]["../../outside"] = raw["files"].pop("versions.json")
    path.write_text(json.dumps(raw))
    assert _there(store) == []


def _on_two_ranks(folder: Path, url: str) -> list[str]:
    put, brought = RemoteFolder.put, []

    def noted(self: RemoteFolder, source: Path, name: str) -> None:
        brought.append(name)
        put(self, source, name)

    RemoteFolder.put = noted  # type: ignore[method-assign]
    manager = _manager(folder / "a", url)
    model = odd_tensors(7)
    manager.save(1, FakeEngine(model), {"step": 1}, {})
    manager.close()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "a")
    dist.barrier()
    state, restored = _restored(_manager(folder / "a", url))
    assert state == {"step": 1}
    assert same(restored, model)
    return brought


def _one_share_fails(folder: Path, url: str) -> float:
    uploads._FIRST_PAUSE_SECONDS = 0.0
    if dist.get_rank() == 1:

        def refuse(self: RemoteFolder, source: Path, name: str) -> None:
            raise ConnectionError("the store is away")

        RemoteFolder.put = refuse  # type: ignore[method-assign]
    manager = _manager(folder / "a", url)
    manager.save(1, FakeEngine(odd_tensors()), {"step": 1}, {})
    manager.wait()
    started = time.monotonic()
    manager._uploads._join()  # type: ignore[union-attr]
    return time.monotonic() - started


def test_nobody_waits_for_a_share_that_failed(store: str, tmp_path: Path) -> None:
    assert max(run_ranks(_one_share_fails, 2, tmp_path, store)) < uploads.PATIENCE_SECONDS / 10
    assert RemoteFolder(store).saves() == []


class _Pretended(Alone):
    """One of two ranks, for what does without collectives."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2


def test_a_share_of_an_earlier_attempt_does_not_count(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first rank deletes what a failed attempt brought, while the other may still be bringing and mark it."""
    manager = CheckpointManager(tmp_path / "a", CheckpointConfig())
    _save(manager, 1)
    folder = manager.root / "step-00000001"
    first, second = (
        uploads.Uploads(RemoteFolder(store), manager.root, CheckpointConfig(), _Pretended(rank), set())
        for rank in (0, 1)
    )
    first.remote.claim("")
    monkeypatch.setattr(uploads, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(uploads, "_POLL_SECONDS", 0.01)
    second._bring(folder, 1)
    first._bring(folder, 2)
    assert ".rank-1 of 1 shares did not arrive" in caplog.text
    assert RemoteFolder(store).names() == [], "the half of it is gone"
    second._bring(folder, 3)
    first._bring(folder, 3)
    assert _there(store) == [1]


def test_two_ranks_share_the_work(store: str, tmp_path: Path) -> None:
    shares = run_ranks(_on_two_ranks, 2, tmp_path, store)
    assert shares[0]
    assert shares[1]
    assert not set(shares[0]) & set(shares[1])
    assert RemoteFolder(store).present("step-00000001-1") == {
        "manifest.json", "model", "optimizer", "train_state.json", "recipe.json", "versions.json",
    }  # fmt: skip
