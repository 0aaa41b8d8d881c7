"""Every way a folder can be damaged, or lead to files outside of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmill.checkpoint import manifest
from leanmill.checkpoint.manifest import digest_file, verify
from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import RunError
from tests.checkpoint.fake import FakeEngine, odd_tensors, zeros_of
from tests.checkpoint.saving import engine_of, manager_of, saved, steps_of, truncate


def _flip(path: Path, name: str, position: int) -> Path:
    data = bytearray((path / name).read_bytes())
    data[position] ^= 4
    (path / name).write_bytes(data)
    return path / name


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "truncated": truncate,
    "flipped data": lambda p: _flip(p, "model/00000-of-00001.safetensors", -5),
    "flipped header": lambda p: _flip(p, "optimizer/00000-of-00001.safetensors", 20),
    "flipped state": lambda p: _flip(p, "train_state.json", 5),
    "flipped index": lambda p: _flip(p, "model/index.json", 40),
    "flipped manifest": lambda p: _flip(p, "manifest.json", 60),
    "missing file": lambda p: ((p / "optimizer/index.json").unlink(), p / "optimizer/index.json")[1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped_loudly(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    manager = manager_of(tmp_path)
    sound, damaged = saved(manager, 1), saved(manager, 2)
    file = DAMAGE[damage](damaged)
    with caplog.at_level(logging.WARNING):
        assert manager_of(tmp_path).find("auto") == sound
    assert damage == "flipped manifest" or str(file) in caplog.text
    assert str(damaged) in caplog.text
    with pytest.raises(RunError, match=str(file)):
        manager_of(tmp_path).find(str(damaged))


def test_folder_without_manifest_is_never_picked(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    sound, cut = saved(manager, 1), saved(manager, 2)
    (cut / "manifest.json").unlink()
    assert manager.latest() == sound
    assert manager_of(tmp_path).find("auto") == sound
    with pytest.raises(RunError, match="never finished"):
        manager_of(tmp_path).find(str(cut))


def test_all_damaged_stops_instead_of_starting_over(tmp_path: Path) -> None:
    truncate(saved(manager_of(tmp_path), 1))
    with pytest.raises(RunError, match="every checkpoint"):
        manager_of(tmp_path).find("auto")


def test_every_single_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = saved(manager_of(tmp_path), 1, FakeEngine({"w": torch.ones(2)}))
    for name in ["model/00000-of-00001.safetensors", "manifest.json", "model/index.json"]:
        intact = (path / name).read_bytes()
        for position in range(0, len(intact), 7):
            _flip(path, name, position)
            assert verify(path), (name, position)
            (path / name).write_bytes(intact)
    assert verify(path) == []


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
    sound, path = saved(manager_of(run_dir), 1), saved(manager_of(run_dir), 2)
    OUTSIDE[way](path, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and run_dir not in p.parents}
    assert before
    engine = FakeEngine(zeros_of(odd_tensors()), zeros_of(engine_of().optimizer))
    message = r"leads out of|no path inside|no name of a file beside it"
    with pytest.raises(RunError, match=message):
        manager_of(run_dir).load(path, engine)
    if way != "linked document":
        with pytest.raises(RunError, match=message):
            read_full_state(path)
    if "index" not in way:  # an index that was signed again is what its manifest says
        assert verify(path)
        assert manager_of(run_dir).find("auto") == sound
    for step in (3, 4, 5):
        saved(manager_of(run_dir), step)
    assert {p: p.read_bytes() for p in before} == before


def test_only_the_link_to_a_checkpoint_is_deleted(tmp_path: Path) -> None:
    elsewhere = saved(manager_of(tmp_path / "other"), 7)
    manager = manager_of(tmp_path / "run")
    manager.root.mkdir(parents=True)
    for name in ("step-00000001", "step-00000002.tmp", "step-00000003.old", "step-00000004.gone"):
        (manager.root / name).symlink_to(elsewhere)
    for step in (5, 6, 8):
        saved(manager, step)
    assert steps_of(manager) == [6, 8]
    assert verify(elsewhere) == []


def test_a_link_inside_the_checkpoint_is_as_good_as_a_file(tmp_path: Path) -> None:
    path = saved(manager_of(tmp_path), 1)
    (path / "recipe.json").rename(path / "recipe-1.json")
    (path / "recipe.json").symlink_to("recipe-1.json")
    assert verify(path) == []
