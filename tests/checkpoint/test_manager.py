"""Saving, finding, loading and pruning in one process, and every way a folder can be damaged."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmill.checkpoint import manifest, snapshot, storage
from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.manifest import digest_file, read_manifest, verify
from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError, RunError
from tests.checkpoint.fake import FakeEngine, odd_tensors, same, zeros_of


def _manager(run_dir: Path, **settings: Any) -> CheckpointManager:
    return CheckpointManager(run_dir, CheckpointConfig(**settings))


def _engine(seed: int = 0) -> FakeEngine:
    optimizer = {"model.embed.weight/exp_avg": torch.randn(7, 5), "model.embed.weight/step": torch.tensor(3.0)}
    return FakeEngine(odd_tensors(seed), optimizer)


def _save(manager: CheckpointManager, step: int, engine: FakeEngine | None = None, **options: Any) -> Path:
    manager.save(step, engine or _engine(step), {"step": step}, {"name": "run"}, **options)
    manager.wait()
    return manager.root / f"step-{step:08d}"


def _steps(manager: CheckpointManager) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in manager.root.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, asynchronous: bool) -> None:
    engine = _engine()
    model, optimizer = dict(engine.model), dict(engine.optimizer)
    path = _save(_manager(tmp_path, asynchronous=asynchronous), 5, engine)
    fresh = FakeEngine(zeros_of(model), zeros_of(optimizer))
    manager = _manager(tmp_path)
    assert manager.find("auto") == path
    assert manager.load(path, fresh) == {"step": 5}
    assert same(fresh.model, model)
    assert same(fresh.optimizer, optimizer)
    assert same(read_full_state(path), model)
    assert same(read_full_state(path, "optimizer"), optimizer)
    assert verify(path) == []


def test_torch_reads_the_files_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    engine = _engine()
    path = _save(_manager(tmp_path), 1, engine)
    assert same(load_file(path / "model" / "00000-of-00001.safetensors"), engine.model)
    target = {"model.embed.weight": torch.zeros(7, 5)}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(path / "model")), no_dist=True)
    assert torch.equal(target["model.embed.weight"], engine.model["model.embed.weight"])


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine()
    path = _save(_manager(tmp_path), 1, engine)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    class Forbidden(pickle.Unpickler):
        load = find_class = forbidden  # type: ignore[assignment]

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(pickle, "Unpickler", Forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.load(io.BytesIO())
    manager, fresh = _manager(tmp_path), FakeEngine(zeros_of(engine.model), zeros_of(engine.optimizer))
    assert manager.find("auto") == path
    manager.load(path, fresh)
    assert same(read_full_state(path), fresh.model)
    assert same(fresh.model, engine.model)


def test_nothing_pickled_is_written(tmp_path: Path) -> None:
    path = _save(_manager(tmp_path), 1)
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_what_training_does_after_save_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine()
    expected = {name: tensor.clone() for name, tensor in engine.model.items()}
    original: Callable[..., Any] = storage._stream

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return original(*args)

    monkeypatch.setattr(storage, "_stream", slow)
    manager = _manager(tmp_path)
    for step in (1, 2):  # the second save reuses the first one's buffers
        expected = {name: tensor.clone() for name, tensor in engine.model.items()}
        stalled = manager.save(step, engine, {"step": step}, {})
        if step == 1:
            assert stalled < 0.2
        for tensor in engine.model.values():
            tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)
    manager.wait()
    assert same(read_full_state(manager.root / "step-00000002"), expected)


def test_the_train_state_is_taken_when_save_is_called(tmp_path: Path) -> None:
    manager, state = _manager(tmp_path), {"data": {"position": 1}}
    manager.save(1, _engine(), state, {})
    state["data"]["position"] = 2
    manager.wait()
    assert json.loads((manager.root / "step-00000001/train_state.json").read_text()) == {"data": {"position": 1}}


def test_credentials_are_not_saved(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    manager.save(1, _engine(), {}, {"data": {"hf_token": "not-to-be-saved"}, "batch": {"tokens_per_step": 8}})
    manager.wait()
    recipe = json.loads((manager.root / "step-00000001/recipe.json").read_text())
    assert recipe == {"data": {"hf_token": "[redacted]"}, "batch": {"tokens_per_step": 8}}


def test_versions_are_saved(tmp_path: Path) -> None:
    versions = json.loads((_save(_manager(tmp_path), 1) / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__


# Damage


def _truncate(path: Path) -> Path:
    file = path / "model/00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 3)
    return file


def _flip(path: Path, name: str, position: int) -> Path:
    data = bytearray((path / name).read_bytes())
    data[position] ^= 4
    (path / name).write_bytes(data)
    return path / name


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "truncated": _truncate,
    "flipped data": lambda p: _flip(p, "model/00000-of-00001.safetensors", -5),
    "flipped header": lambda p: _flip(p, "optimizer/00000-of-00001.safetensors", 20),
    "flipped state": lambda p: _flip(p, "train_state.json", 5),
    "flipped index": lambda p: _flip(p, "model/index.json", 40),
    "flipped manifest": lambda p: _flip(p, "manifest.json", 60),
    "missing file": lambda p: ((p / "optimizer/index.json").unlink(), p / "optimizer/index.json")[1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped_loudly(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    manager = _manager(tmp_path)
    sound, damaged = _save(manager, 1), _save(manager, 2)
    file = DAMAGE[damage](damaged)
    with caplog.at_level(logging.WARNING):
        assert _manager(tmp_path).find("auto") == sound
    assert damage == "flipped manifest" or str(file) in caplog.text
    assert str(damaged) in caplog.text
    with pytest.raises(RunError, match=str(file)):
        _manager(tmp_path).find(str(damaged))


def test_folder_without_manifest_is_never_picked(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    sound, cut = _save(manager, 1), _save(manager, 2)
    (cut / "manifest.json").unlink()
    assert manager.latest() == sound
    assert _manager(tmp_path).find("auto") == sound
    with pytest.raises(RunError, match="never finished"):
        _manager(tmp_path).find(str(cut))


def test_all_damaged_stops_instead_of_starting_over(tmp_path: Path) -> None:
    _truncate(_save(_manager(tmp_path), 1))
    with pytest.raises(RunError, match="every checkpoint"):
        _manager(tmp_path).find("auto")


def test_every_single_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = _save(_manager(tmp_path), 1, FakeEngine({"w": torch.ones(2)}))
    for name in ["model/00000-of-00001.safetensors", "manifest.json", "model/index.json"]:
        intact = (path / name).read_bytes()
        for position in range(0, len(intact), 7):
            _flip(path, name, position)
            assert verify(path), (name, position)
            (path / name).write_bytes(intact)
    assert verify(path) == []


# Finding


def test_find_in_an_empty_run(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    assert manager.find("auto") is None
    assert manager.find("never") is None
    assert manager.latest() is None


def test_never_refuses_a_run_that_has_checkpoints(tmp_path: Path) -> None:
    _save(_manager(tmp_path), 1)
    with pytest.raises(ConfigError, match="resume=auto"):
        _manager(tmp_path).find("never")


def test_a_path_may_be_a_run_folder(tmp_path: Path) -> None:
    path = _save(_manager(tmp_path / "first"), 3)
    other = _manager(tmp_path / "second")
    assert other.find(str(tmp_path / "first")) == path
    assert other.find(str(tmp_path / "first" / "checkpoints")) == path
    assert other.find(str(path)) == path
    with pytest.raises(ConfigError, match="no such folder"):
        other.find(str(tmp_path / "third"))


def test_newest_is_by_time_of_saving_not_by_step(tmp_path: Path) -> None:
    manager = _manager(tmp_path, keep_last=5)
    for step in (10, 20, 30):
        _save(manager, step)
    branch = _save(_manager(tmp_path, keep_last=5), 15)  # went back to step 10
    assert _manager(tmp_path).find("auto") == branch


# Pruning


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    manager = _manager(tmp_path, keep_last=2)
    for step, score in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)]:
        _save(manager, step, score=score)
    assert _steps(manager) == [2, 4, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path, bad: float, at: int) -> None:
    manager = _manager(tmp_path, keep_last=2)
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: bad, 5: bad} | {at: bad}
    for step, score in scores.items():
        path = _save(manager, step, score=score)
    best = min((score, step) for step, score in scores.items() if abs(score) < 10)[1]
    assert _steps(manager) == sorted({best, 4, 5})
    assert "NaN" not in (path / "manifest.json").read_text()
    assert read_manifest(path).score is None


def test_a_score_that_is_no_number_in_an_older_manifest_is_none(tmp_path: Path) -> None:
    path = _save(_manager(tmp_path), 1, score=1.0)
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    content["score"] = float("nan")
    (path / "manifest.json").write_text(json.dumps({**content, "digest": manifest._digest_json(content)}))
    assert read_manifest(path).score is None


def test_keep_best_off(tmp_path: Path) -> None:
    manager = _manager(tmp_path, keep_last=2, keep_best=False)
    for step in range(1, 5):
        _save(manager, step, score=float(step))
    assert _steps(manager) == [3, 4]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    first = _manager(tmp_path)
    good, bad = _save(first, 1), _save(first, 2)
    _truncate(bad)
    second = _manager(tmp_path)
    assert second.find("auto") == good
    _save(second, 3)
    assert _steps(second) == [1, 3]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    _save(manager, 1, _engine(1))
    path = _save(manager, 1, _engine(2))
    assert same(read_full_state(path), odd_tensors(2))
    assert _steps(manager) == [1]


# Failing saves


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    manager = _manager(tmp_path, asynchronous=asynchronous)
    sound = _save(manager, 1)

    def full(file: Any, data: memoryview, digest: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_all", full)
        with pytest.raises(RunError, match=r"step-00000002 failed: the disk is full.*Free space") as caught:
            _save(manager, 2)
    assert "\n" not in str(caught.value)
    assert _steps(manager) == [1]
    assert verify(sound) == []
    _save(manager, 3)
    assert _steps(manager) == [1, 3]


def test_error_in_the_background_surfaces_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = _manager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "record_file", lambda path: (_ for _ in ()).throw(RuntimeError("broken")))
        manager.save(1, _engine(), {}, {})
        assert manager._thread is not None
        manager._thread.join()
    with pytest.raises(RunError, match="broken"):
        manager.save(2, _engine(), {}, {})
    _save(manager, 3)
    assert _steps(manager) == [3]


def test_a_failing_run_still_finishes_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = _manager(tmp_path)
    manager.save(1, _engine(), {}, {})
    manager.drain()
    assert verify(manager.root / "step-00000001") == []
    monkeypatch.setattr(storage, "record_file", lambda path: (_ for _ in ()).throw(RuntimeError("broken")))
    manager.save(2, _engine(), {}, {})
    manager.drain()  # the run's own error is the one to raise
    assert "broken" in caplog.text
    manager.drain()


def test_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    manager = _manager(tmp_path, asynchronous=False)
    with pytest.raises(RunError, match=r"saving .*step-00000001 failed: .*checkpoints"):
        manager.save(1, _engine(), {}, {})


@pytest.mark.parametrize("after_files", [0, 1, 2])
def test_kill_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_files: int) -> None:
    manager = _manager(tmp_path)
    sound = _save(manager, 1)
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
        _manager(tmp_path, asynchronous=False).save(2, _engine(), {}, {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed == (after_files < 2)
    second = _manager(tmp_path)
    if killed:
        assert [p.name for p in second.root.iterdir() if p.suffix] == ["step-00000002.tmp"]
        assert second.find("auto") == sound
    _save(second, 3)
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
            _manager(run_dir, asynchronous=False, **settings).save(2, _engine(12), {"step": 2}, {})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_kill_at_each_step_of_saving_again_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for number in range(100):
        run_dir = tmp_path / str(number)
        for step in (1, 2):
            _save(_manager(run_dir), step)
        killed = _killed_at(run_dir, number)
        manager = _manager(run_dir)
        path = manager.find("auto")
        assert path is not None
        assert path.name.startswith("step-00000002"), number
        assert verify(path) == []
        state = read_full_state(path)
        assert same(state, odd_tensors(2)) or same(state, odd_tensors(12)), number
        found.append(same(state, odd_tensors(12)))
        _save(manager, 3)
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
            _save(_manager(run_dir), step)
        killed = _killed_at(run_dir, number)
        second = _manager(run_dir)
        path = second.find("auto")
        assert path is not None
        assert second._retention.damaged == set(), number
        _save(second, 3)
        assert {p.name for p in second.root.iterdir()} == {path.name, "step-00000003"}, number
        if not killed:
            break
    assert not killed


def test_what_a_killed_run_left_goes_without_another_save(tmp_path: Path) -> None:
    manager = _manager(tmp_path, keep_last=8)
    for step in (1, 2, 3, 4):
        _save(manager, step)
    root = manager.root
    (root / "step-00000001").rename(root / "step-00000001.gone")
    (root / "step-00000002").rename(root / "step-00000002.old")
    (root / "step-00000004").rename(root / "step-00000004.tmp")
    _manager(tmp_path).clear_away()
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    _manager(tmp_path / "new").clear_away()
    assert not (tmp_path / "new").exists()


def test_a_rename_that_fails_leaves_the_earlier_save_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = _manager(tmp_path, asynchronous=False)
    _save(manager, 1, _engine(1))
    original = os.rename

    def fail(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp") and not str(target).endswith(".gone"):
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(RunError, match="earlier checkpoints are intact"):
        manager.save(1, _engine(2), {}, {})
    assert _steps(manager) == [1]
    assert same(read_full_state(manager.root / "step-00000001"), odd_tensors(1))


# Files outside


def _outside(path: Path, tmp_path: Path) -> Path:
    """A file that a checkpoint must not reach, with the bytes the checkpoint's own file has."""
    target = tmp_path / "outside.safetensors"
    target.write_bytes((path / "model/00000-of-00001.safetensors").read_bytes())
    return target


def _resign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as someone who can compute its checksum would."""
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    index = content["files"]["model/index.json"]
    index.update(size=(path / "model/index.json").stat().st_size, xxh3_128=digest_file(path / "model/index.json"))
    change(content)
    (path / "manifest.json").write_text(json.dumps({**content, "digest": manifest._digest_json(content)}))


def _through_index(path: Path, tmp_path: Path, name: str) -> None:
    index = (path / "model/index.json").read_text()
    (path / "model/index.json").write_text(index.replace("00000-of-00001.safetensors", name))
    _resign(path, lambda content: None)


def _through_manifest(path: Path, tmp_path: Path, name: str) -> None:
    files = "model/00000-of-00001.safetensors"
    _resign(path, lambda content: content["files"].update({name: content["files"].pop(files)}))


def _link(path: Path, name: str, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    (path / name).rename(target) if not target.exists() else (path / name).unlink()
    (path / name).symlink_to(target)


OUTSIDE: dict[str, Callable[[Path, Path], Any]] = {
    "absolute in the index": lambda p, t: _through_index(p, t, str(_outside(p, t))),
    "parent in the index": lambda p, t: _through_index(p, t, f"../../../../{_outside(p, t).name}"),
    "absolute in the manifest": lambda p, t: _through_manifest(p, t, str(_outside(p, t))),
    "parent in the manifest": lambda p, t: _through_manifest(p, t, f"../../../{_outside(p, t).name}"),
    "linked tensors": lambda p, t: _link(p, "model/00000-of-00001.safetensors", _outside(p, t)),
    "linked part": lambda p, t: _link(p, "model", t / "elsewhere"),
    "linked document": lambda p, t: _link(p, "train_state.json", t / "state.json"),
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_nothing_outside_a_checkpoint_is_read(tmp_path: Path, way: str) -> None:
    run_dir = tmp_path / "run"
    sound, path = _save(_manager(run_dir), 1), _save(_manager(run_dir), 2)
    OUTSIDE[way](path, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and run_dir not in p.parents}
    assert before
    engine = FakeEngine(zeros_of(odd_tensors()), zeros_of(_engine().optimizer))
    message = r"leads out of|no path inside|no name of a file beside it"
    with pytest.raises(RunError, match=message):
        _manager(run_dir).load(path, engine)
    if way != "linked document":
        with pytest.raises(RunError, match=message):
            read_full_state(path)
    if "index" not in way:  # an index that was signed again is what its manifest says
        assert verify(path)
        assert _manager(run_dir).find("auto") == sound
    for step in (3, 4, 5):
        _save(_manager(run_dir), step)
    assert {p: p.read_bytes() for p in before} == before


def test_only_the_link_to_a_checkpoint_is_deleted(tmp_path: Path) -> None:
    elsewhere = _save(_manager(tmp_path / "other"), 7)
    manager = _manager(tmp_path / "run")
    manager.root.mkdir(parents=True)
    for name in ("step-00000001", "step-00000002.tmp", "step-00000003.old", "step-00000004.gone"):
        (manager.root / name).symlink_to(elsewhere)
    for step in (5, 6, 8):
        _save(manager, step)
    assert _steps(manager) == [6, 8]
    assert verify(elsewhere) == []


def test_a_link_inside_the_checkpoint_is_as_good_as_a_file(tmp_path: Path) -> None:
    path = _save(_manager(tmp_path), 1)
    (path / "recipe.json").rename(path / "recipe-1.json")
    (path / "recipe.json").symlink_to("recipe-1.json")
    assert verify(path) == []


# Another model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("model.one"), r"1 only in the checkpoint \(model.one\)"),
        (lambda m: m.update(new=torch.ones(1)), r"1 not in the checkpoint \(new\)"),
        (
            lambda m: m.update({"model.short": torch.ones(2, 3)}),
            r"1 different \(model.short \[2, 2\] float32 in the checkpoint, \[2, 3\]",
        ),
        (lambda m: m.update({"model.mask": torch.ones(6, 4)}), r"model.mask \[6, 4\] bool"),
    ],
)
def test_checkpoint_of_another_model(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    engine = _engine()
    path = _save(_manager(tmp_path), 1, engine)
    other = FakeEngine(zeros_of(engine.model), zeros_of(engine.optimizer))
    change(other.model)
    with pytest.raises(ConfigError, match=f"belongs to another model.*{message}"):
        _manager(tmp_path).load(path, other)


def test_checkpoint_of_another_optimizer(tmp_path: Path) -> None:
    engine = _engine()
    path = _save(_manager(tmp_path), 1, engine)
    with pytest.raises(ConfigError, match="belongs to another optimizer"):
        _manager(tmp_path).load(path, FakeEngine(zeros_of(engine.model), {}))


def test_floats_are_cast(tmp_path: Path) -> None:
    path = _save(_manager(tmp_path), 1, FakeEngine({"w": torch.tensor([1.5, 2.25])}))
    other = FakeEngine({"w": torch.zeros(2, dtype=torch.bfloat16)})
    _manager(tmp_path).load(path, other)
    assert other.model["w"].tolist() == [1.5, 2.25]


# Adapter runs


def test_only_the_named_parameters_are_saved(tmp_path: Path) -> None:
    engine = _engine()
    names = {"model.one", "model.mask"}
    path = _save(_manager(tmp_path), 1, engine, names=names, base="abc")
    assert read_full_state(path).keys() == names
    assert read_manifest(path).base == "abc"
    other = FakeEngine(zeros_of(engine.model), zeros_of(engine.optimizer))
    manager = _manager(tmp_path)
    manager.load(path, other, names=names, base="abc")
    assert torch.equal(other.model["model.mask"], engine.model["model.mask"])
    assert not other.model["model.embed.weight"].any()
    with pytest.raises(ConfigError, match="another base model"):
        manager.load(path, other, names=names, base="abd")
    with pytest.raises(ConfigError, match="only the trained parameters"):
        manager.load(path, other)


# Copies beside training


def test_overlapped_copies_hold_the_moment_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine()
    trained = engine.model["model.embed.weight"]  # the one with optimizer state
    manager = CheckpointManager(tmp_path, CheckpointConfig(), overlap=True)
    original: Callable[..., Any] = snapshot._copy_on_host
    put_off: list[int] = []

    def slow(pairs: list[Any]) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
            put_off.append(len(pairs))
        original(pairs)

    monkeypatch.setattr(snapshot, "_copy_on_host", slow)
    for step in (1, 2):
        model, optimizer = _clones(engine.model), _clones(engine.optimizer)
        assert manager.save(step, engine, {}, {}) < 0.2
        for name, tensor in engine.model.items():
            if name != "model.embed.weight":  # a forward or a step rule may write it at once
                tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)
        assert manager.finish_copies() > 0.2
        assert manager.finish_copies() < 0.2
        trained.add_(1)
        engine.optimizer["model.embed.weight/exp_avg"].zero_()
        manager.wait()
        path = manager.root / f"step-{step:08d}"
        assert same(read_full_state(path), model)
        assert same(read_full_state(path, "optimizer"), optimizer)
    assert put_off == [1, 2, 1, 2]


def test_finish_copies_without_a_save_is_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, CheckpointConfig(), overlap=True)
    assert manager.finish_copies() < 0.1
    manager.save(1, _engine(), {}, {})
    manager.wait()
    assert manager.finish_copies() < 0.1


def _clones(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
