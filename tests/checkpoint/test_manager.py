"""Saving, finding, loading and pruning in one process."""

from __future__ import annotations

import io
import json
import pickle
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
from leanmill.checkpoint.manifest import read_manifest, verify
from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from tests.checkpoint.fake import FakeEngine, odd_tensors, same, zeros_of
from tests.checkpoint.saving import engine_of, manager_of, saved, steps_of, truncate


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, asynchronous: bool) -> None:
    engine = engine_of()
    model, optimizer = dict(engine.model), dict(engine.optimizer)
    path = saved(manager_of(tmp_path, asynchronous=asynchronous), 5, engine)
    fresh = FakeEngine(zeros_of(model), zeros_of(optimizer))
    manager = manager_of(tmp_path)
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

    engine = engine_of()
    path = saved(manager_of(tmp_path), 1, engine)
    assert same(load_file(path / "model" / "00000-of-00001.safetensors"), engine.model)
    target = {"model.embed.weight": torch.zeros(7, 5)}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(path / "model")), no_dist=True)
    assert torch.equal(target["model.embed.weight"], engine.model["model.embed.weight"])


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    path = saved(manager_of(tmp_path), 1, engine)

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
    manager, fresh = manager_of(tmp_path), FakeEngine(zeros_of(engine.model), zeros_of(engine.optimizer))
    assert manager.find("auto") == path
    manager.load(path, fresh)
    assert same(read_full_state(path), fresh.model)
    assert same(fresh.model, engine.model)


def test_nothing_pickled_is_written(tmp_path: Path) -> None:
    path = saved(manager_of(tmp_path), 1)
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_what_training_does_after_save_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    expected = {name: tensor.clone() for name, tensor in engine.model.items()}
    original: Callable[..., Any] = storage._stream

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return original(*args)

    monkeypatch.setattr(storage, "_stream", slow)
    manager = manager_of(tmp_path)
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
    manager, state = manager_of(tmp_path), {"data": {"position": 1}}
    manager.save(1, engine_of(), state, {})
    state["data"]["position"] = 2
    manager.wait()
    assert json.loads((manager.root / "step-00000001/train_state.json").read_text()) == {"data": {"position": 1}}


def test_credentials_are_not_saved(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    manager.save(1, engine_of(), {}, {"data": {"hf_token": "not-to-be-saved"}, "batch": {"tokens_per_step": 8}})
    manager.wait()
    recipe = json.loads((manager.root / "step-00000001/recipe.json").read_text())
    assert recipe == {"data": {"hf_token": "[redacted]"}, "batch": {"tokens_per_step": 8}}


def test_versions_are_saved(tmp_path: Path) -> None:
    versions = json.loads((saved(manager_of(tmp_path), 1) / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__


# Finding


def test_find_in_an_empty_run(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    assert manager.find("auto") is None
    assert manager.find("never") is None
    assert manager.latest() is None


def test_never_refuses_a_run_that_has_checkpoints(tmp_path: Path) -> None:
    saved(manager_of(tmp_path), 1)
    with pytest.raises(ConfigError, match="resume=auto"):
        manager_of(tmp_path).find("never")


def test_a_path_may_be_a_run_folder(tmp_path: Path) -> None:
    path = saved(manager_of(tmp_path / "first"), 3)
    other = manager_of(tmp_path / "second")
    assert other.find(str(tmp_path / "first")) == path
    assert other.find(str(tmp_path / "first" / "checkpoints")) == path
    assert other.find(str(path)) == path
    with pytest.raises(ConfigError, match="no such folder"):
        other.find(str(tmp_path / "third"))


def test_newest_is_by_time_of_saving_not_by_step(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, keep_last=5)
    for step in (10, 20, 30):
        saved(manager, step)
    branch = saved(manager_of(tmp_path, keep_last=5), 15)  # went back to step 10
    assert manager_of(tmp_path).find("auto") == branch


# Pruning


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, keep_last=2)
    for step, score in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)]:
        saved(manager, step, score=score)
    assert steps_of(manager) == [2, 4, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path, bad: float, at: int) -> None:
    manager = manager_of(tmp_path, keep_last=2)
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: bad, 5: bad} | {at: bad}
    for step, score in scores.items():
        path = saved(manager, step, score=score)
    best = min((score, step) for step, score in scores.items() if abs(score) < 10)[1]
    assert steps_of(manager) == sorted({best, 4, 5})
    assert "NaN" not in (path / "manifest.json").read_text()
    assert read_manifest(path).score is None


def test_a_score_that_is_no_number_in_an_older_manifest_is_none(tmp_path: Path) -> None:
    path = saved(manager_of(tmp_path), 1, score=1.0)
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    content["score"] = float("nan")
    (path / "manifest.json").write_text(json.dumps({**content, "digest": manifest._digest_json(content)}))
    assert read_manifest(path).score is None


def test_keep_best_off(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, keep_last=2, keep_best=False)
    for step in range(1, 5):
        saved(manager, step, score=float(step))
    assert steps_of(manager) == [3, 4]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    first = manager_of(tmp_path)
    good, bad = saved(first, 1), saved(first, 2)
    truncate(bad)
    second = manager_of(tmp_path)
    assert second.find("auto") == good
    saved(second, 3)
    assert steps_of(second) == [1, 3]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    saved(manager, 1, engine_of(1))
    path = saved(manager, 1, engine_of(2))
    assert same(read_full_state(path), odd_tensors(2))
    assert steps_of(manager) == [1]


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
    engine = engine_of()
    path = saved(manager_of(tmp_path), 1, engine)
    other = FakeEngine(zeros_of(engine.model), zeros_of(engine.optimizer))
    change(other.model)
    with pytest.raises(ConfigError, match=f"belongs to another model.*{message}"):
        manager_of(tmp_path).load(path, other)


def test_checkpoint_of_another_optimizer(tmp_path: Path) -> None:
    engine = engine_of()
    path = saved(manager_of(tmp_path), 1, engine)
    with pytest.raises(ConfigError, match="belongs to another optimizer"):
        manager_of(tmp_path).load(path, FakeEngine(zeros_of(engine.model), {}))


def test_floats_are_cast(tmp_path: Path) -> None:
    path = saved(manager_of(tmp_path), 1, FakeEngine({"w": torch.tensor([1.5, 2.25])}))
    other = FakeEngine({"w": torch.zeros(2, dtype=torch.bfloat16)})
    manager_of(tmp_path).load(path, other)
    assert other.model["w"].tolist() == [1.5, 2.25]


# Adapter runs


def test_only_the_named_parameters_are_saved(tmp_path: Path) -> None:
    engine = engine_of()
    names = {"model.one", "model.mask"}
    path = saved(manager_of(tmp_path), 1, engine, names=names, base="abc")
    assert read_full_state(path).keys() == names
    assert read_manifest(path).base == "abc"
    other = FakeEngine(zeros_of(engine.model), zeros_of(engine.optimizer))
    manager = manager_of(tmp_path)
    manager.load(path, other, names=names, base="abc")
    assert torch.equal(other.model["model.mask"], engine.model["model.mask"])
    assert not other.model["model.embed.weight"].any()
    with pytest.raises(ConfigError, match="another base model"):
        manager.load(path, other, names=names, base="abd")
    with pytest.raises(ConfigError, match="only the trained parameters"):
        manager.load(path, other)


# Copies beside training


def test_overlapped_copies_hold_the_moment_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
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
    manager.save(1, engine_of(), {}, {})
    manager.wait()
    assert manager.finish_copies() < 0.1


def _clones(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
