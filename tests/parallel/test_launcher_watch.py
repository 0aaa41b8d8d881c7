"""A rank does not outlive the torchrun that started it. No torch here: each process starts in a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import is_running


ROOT = Path(__file__).parents[2]

RANK = """
import os, sys, time
from leanmill.parallel import launcher_watch
if sys.argv[1] == "thread":
    launcher_watch._kernel_kills_with_parent = lambda: False
launcher_watch.end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""

LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
time.sleep(60)
"""


def _orphaned_rank(how: str, environment: dict[str, str], ending: signal.Signals) -> int:
    """Start a launcher with one rank, end the launcher; return the rank's pid."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.send_signal(ending)
    launcher.wait()
    launcher.stdout.close()
    return pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("how", "ending"), [("kernel", signal.SIGKILL), ("kernel", signal.SIGUSR1), ("thread", signal.SIGKILL)]
)
def test_a_rank_ends_with_torchrun(how: str, ending: signal.Signals) -> None:
    pid = _orphaned_rank(how, {"TORCHELASTIC_RUN_ID": "x"}, ending)
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "the rank lives on"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_torchrun_did_not_start_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    pid = _orphaned_rank("kernel", {}, signal.SIGKILL)
    try:
        time.sleep(0.7)
        assert is_running(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
