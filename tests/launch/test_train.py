"""`launch/train.py` as torchrun starts it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"


def _module():
    spec = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overrides_stand_anywhere():
    args = _module().parse_args(["a.b=1", "--config", "r.yaml", "c=2", "--debug", "d.e=3"])
    assert args.config == "r.yaml"
    assert args.overrides == ["a.b=1", "c=2", "d.e=3"]
    assert args.debug


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


def test_leaves_after_flushing_without_teardown():
    code = (
        f"import importlib.util, atexit\n"
        f"spec = importlib.util.spec_from_file_location('t', {str(SCRIPT)!r})\n"
        f"t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        f"atexit.register(print, 'teardown ran')\n"
        f"print('buffered', end=''); t.leave(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "buffered")
