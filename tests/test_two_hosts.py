"""A run over two hosts whose cable is pulled: the lost host is named, both ends end, and the run goes on afterwards."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import NETWORK, TwoHosts, why_not
from tests.test_end_to_end import ROOT, write_recipe


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HANG_SECONDS, STEP_TIMEOUT_SECONDS = 3, 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_pulled_cable_is_named_and_the_run_goes_on(tmp_path: Path, cache: Path) -> None:
    recipe, run = write_recipe(tmp_path, cache, "ddp", 100_000), tmp_path / "run"
    overrides = [f"cluster.hang_seconds={HANG_SECONDS}", f"cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}"]

    def start(hosts: TwoHosts, *more: str) -> list:
        return [
            hosts.start(
                node,
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
                    *("--nproc-per-node", "1", "--master-addr", f"{NETWORK}.1", "--master-port", "29500"),
                    *(str(ROOT / "launch/train.py"), "--config", str(recipe), *overrides, *more),
                ],
                OMP_NUM_THREADS="1",
            )
            for node in range(2)
        ]

    with TwoHosts() as hosts:
        ends = start(hosts)
        _wait(lambda: (run / "checkpoints/step-00000010").is_dir(), 180)
        pulled = time.monotonic()
        hosts.plug(is_in=False)
        outputs = [end.communicate(timeout=180)[0] for end in ends]
        seconds = time.monotonic() - pulled
        first = outputs[0]
        assert "nothing has moved for" in first, first[-3000:]
        assert "rank 1 (node-1, process " in first
        assert "is silent: stopped, or its machine is" in first
        assert "another rank ended or hangs" in first
        # The other one cannot ask anybody: the store is on the first host.
        assert "the machine where the ranks met" in outputs[1], outputs[1][-3000:]
        # torchrun waits 30 s for a rank that it tells to end.
        assert seconds < STEP_TIMEOUT_SECONDS + 90
        assert all(end.returncode != 0 for end in ends)

        hosts.plug(is_in=True)
        done = json.loads(sorted((run / "checkpoints").glob("step-*/train_state.json"))[-1].read_text())["step"]
        ends = start(hosts, f"train.steps={done + 4}")
        outputs = [end.communicate(timeout=180)[0] for end in ends]
        assert [end.returncode for end in ends] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
        assert f"at step {done}" in outputs[0]


def _wait(is_true, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)
