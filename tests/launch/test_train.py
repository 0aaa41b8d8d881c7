"""`launch/train.py` as torchrun starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--config", "missing.yaml"], 2, "error: no recipe at missing.yaml"),
        (["--config", "recipes/quickstart.yaml", "train.stesp=1"], 2, "did you mean 'steps'?"),
        ([], 2, "--config"),
        (["--help"], 0, ""),
    ],
)
def test_exit_codes_reach_the_shell(args, code, message):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
