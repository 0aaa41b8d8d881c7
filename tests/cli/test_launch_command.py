"""`leanmill launch` becomes torchrun."""

import os
import sys

import pytest

from leanmill.cli.main import main


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Command and environment that the process would become, in a folder with a recipe."""
    found = {}
    (tmp_path / "r.yaml").write_text("model: {path: m}\ntrain: {steps: 1}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def execv(path, command):
        found.update(path=path, command=command, environment=dict(os.environ))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr("leanmill.parallel.launch.num_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found


def test_ranks_of_one_machine_share_its_cores_and_meet_by_themselves(started):
    main(["launch", "r.yaml", "train.steps=3", "--ranks", "2", "--debug"])
    assert started["command"][:3] == [sys.executable, "-m", "torch.distributed.run"]
    launched = "--standalone --nproc-per-node 2 -m leanmill.cli.rank --config r.yaml train.steps=3 --debug"
    assert " ".join(started["command"][3:]) == launched
    assert started["environment"]["OMP_NUM_THREADS"] == "3"


def test_several_machines_meet_where_they_are_told(started):
    main(["launch", "r.yaml", "--ranks", "8", "--nodes", "2", "--rendezvous", "head:29500"])
    command = " ".join(started["command"])
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint head:29500" in command
    assert started["environment"]["OMP_NUM_THREADS"] == "1"


def test_without_gpus_there_is_one_rank(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    main(["launch", "r.yaml"])
    assert "--nproc-per-node 1" in " ".join(started["command"])


def test_several_machines_need_a_place_to_meet(started, capsys):
    assert main(["launch", "r.yaml", "--ranks", "1", "--nodes", "2"]) == 2
    assert "give --rendezvous HOST:PORT" in capsys.readouterr().err
    assert not started


def test_a_wrong_recipe_starts_nothing(started, capsys):
    assert main(["launch", "r.yaml", "train.stepz=3", "--ranks", "2"]) == 2
    assert "stepz" in capsys.readouterr().err
    assert not started
