"""`leanmill ckpt` over a run with two checkpoints."""

import pytest
from safetensors.torch import load_file

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.cli.main import main
from tests.checkpoint.fake import FakeEngine, odd_tensors, same


@pytest.fixture
def run_dir(tmp_path):
    manager = CheckpointManager(tmp_path / "run", CheckpointConfig(keep_last=2))
    for step in (1, 2):
        manager.save(step, FakeEngine(odd_tensors(step), {}), {"step": step}, {"name": "run"}, score=3.0 - step)
        manager.wait()
    return tmp_path / "run"


def damage(folder):
    file = next((folder / "model").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_inspect_lists_checkpoints_and_the_tensors_of_one(run_dir, capsys):
    assert main(["ckpt", "inspect", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("step-00000001", "step-00000002", "2.0000", "1.0000"))
    assert main(["ckpt", "inspect", str(run_dir / "checkpoints/step-00000002"), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "model.experts float64 [3, 2, 5]" in said
    assert "optimizer: 0 tensors" in said


def test_verify_finds_one_changed_bit(run_dir, capsys):
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": sound") == 2
    damage(run_dir / "checkpoints/step-00000001")
    assert main(["ckpt", "verify", str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert said.count(": sound") == 1
    assert "step-00000001: DAMAGED" in said
    assert "contents differ" in said


def test_convert_writes_the_newest_sound_one_whole(run_dir, tmp_path, capsys):
    damage(run_dir / "checkpoints/step-00000002")
    assert main(["ckpt", "convert", str(run_dir), "--out", str(tmp_path / "plain")]) == 0
    assert same(load_file(tmp_path / "plain/model.safetensors"), odd_tensors(1))
    assert '"step": 1' in (tmp_path / "plain/train_state.json").read_text()
    assert main(["ckpt", "convert", str(run_dir), "--out", str(tmp_path / "plain")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{run}"], "needs --out FOLDER"),
        (["verify", "{run}", "--out", "x"], "leave --out away"),
        (["inspect", "{run}/nowhere"], "no checkpoint at"),
        (["inspect", "{run}", "--tensors"], "give one of"),
    ],
)
def test_refuses(arguments, message, run_dir, capsys):
    assert main(["ckpt", *(part.format(run=run_dir) for part in arguments)]) == 2
    assert message in capsys.readouterr().err
