"""Processes start under torchrun and alone, and end cleanly."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from leanmill.core.errors import ConfigError
from leanmill.parallel import launch
from leanmill.parallel.launch import finish, init_processes, num_cores, patient_group, set_threads, set_timeout
from tests.distributed import run_ranks


CLUSTER = SimpleNamespace(init_timeout_seconds=60, flight_recorder=True)

SCRIPT = """
import os, sys
from types import SimpleNamespace
import torch
from leanmill.parallel.collectives import broadcast_object, sum_over_ranks
from leanmill.parallel.launch import finish, init_processes, set_timeout
ranks = init_processes("cpu", SimpleNamespace(init_timeout_seconds=60, flight_recorder=True))
total = sum_over_ranks(torch.tensor(float(ranks.rank + 1)))
set_timeout(30)
name = broadcast_object("from 0" if ranks.rank == 0 else None)
finish()
# In one write, as both ranks have one pipe.
sys.stdout.write(f"rank {ranks.rank}/{ranks.world_size} local {ranks.local_rank}: {total:g} {name}\\n")
sys.stdout.flush()
os._exit(0)
"""


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("rank"))
    assert lines == ["rank 0/2 local 0: 3 from 0", "rank 1/2 local 1: 3 from 0"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_one_process_has_no_group() -> None:
    ranks = init_processes("cpu", CLUSTER)
    assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, torch.device("cpu"))
    assert not dist.is_initialized()
    set_timeout(5)
    finish()


@pytest.mark.usefixtures("alone")
def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device=cpu"):
        init_processes("cuda", CLUSTER)
    assert init_processes("auto", CLUSTER).device.type == "cpu"


@pytest.mark.usefixtures("alone")
def test_more_processes_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"4 processes .* 2 GPUs; type torchrun --nproc-per-node 2"):
        init_processes("auto", CLUSTER)


def test_a_broken_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        init_processes("cpu", CLUSTER)


def test_threads_are_shared_out_unless_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(launch, "num_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_threads(2)
    assert calls == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    for local_world_size in (2, 3, 100):
        set_threads(local_world_size)
    assert calls == [4, 2, 1]
    assert num_cores() >= 1


def test_warns_of_restarts_on_a_shared_store(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    with caplog.at_level(logging.WARNING):
        launch._warn_of_shared_store()
        assert caplog.text == ""
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        launch._warn_of_shared_store()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text


def test_warns_of_a_torchrun_that_kills_early(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    with caplog.at_level(logging.WARNING):
        for version in ("2.12.0", "2.13.0+cpu"):
            monkeypatch.setattr(torch, "__version__", TorchVersion(version))
            launch._warn_of_short_shutdown(0)
        assert caplog.text == ""
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
        launch._warn_of_short_shutdown(1)
        assert caplog.text == ""
        launch._warn_of_short_shutdown(0)
    assert "kills ranks 30 s after a signal" in caplog.text


def test_the_shortened_timeout_counts_for_every_group_but_those_that_state_their_own() -> None:
    def body() -> tuple[list[str], float]:
        groups = [None, dist.new_group([0, 1])]
        patient = patient_group(timedelta(seconds=60))
        set_timeout(1)
        if dist.get_rank() == 1:
            time.sleep(4)
        failures = []
        value = torch.ones(1)
        dist.all_reduce(value, group=patient)
        if dist.get_rank() == 1:
            time.sleep(4)
            return [], value.item()
        for group in groups:
            try:
                dist.all_reduce(torch.zeros(1), group=group)
            except RuntimeError as error:
                failures.append(str(error))
        return failures, value.item()

    (failures, total), _ = run_ranks(body, 2)
    assert total == 2
    assert len(failures) == 2
    assert all("imed out" in text or "imeout" in text for text in failures), failures


def test_timeouts_are_given_to_the_group() -> None:
    def body() -> bool:
        set_timeout(7)
        group = dist.distributed_c10d._get_default_group()
        return group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)

    assert run_ranks(body, 1) == [True]
