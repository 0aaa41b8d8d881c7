"""What a user reads is ours: no line of another library that nobody can act on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_end_to_end import cache, write_recipe  # noqa: F401


ROOT = Path(__file__).resolve().parents[1]
FOREIGN = re.compile(r"warning|site-packages|failed to load|^[IWE]\d{4} |^\[\d{4}-|^\*{5}", re.IGNORECASE)
VERBS = """
import sys
from leanmill.cli.main import main
recipe, run_dir, out = sys.argv[1:]
assert main(["plan", recipe]) == 0
assert main(["eval", "--checkpoint", run_dir]) == 0
assert main(["export", "--checkpoint", run_dir, "--to", "hf", "--out", out]) == 0
"""


def read(*command):
    """Return what a command wrote to stdout and to stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.timeout(400)
@pytest.mark.xdist_group("end_to_end")
def test_no_command_shows_a_line_of_another_library(tmp_path, cache):  # noqa: F811
    recipe = write_recipe(tmp_path, cache, "fsdp", 4)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    train = (*torchrun, ROOT / "launch/train.py", "--config", recipe, "checkpoint.every_steps=1")
    out, err = read(*train)
    assert [line for line in out + err if FOREIGN.search(line)] == []
    # One process for the three, so that what is said at an import is said once; no test runs before them in it.
    out, err = read("-c", VERBS, recipe, tmp_path / "run", tmp_path / "exported")
    assert [line for line in out if FOREIGN.search(line)] == []
    assert err == []
