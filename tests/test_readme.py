"""The commands of the README do what it says, at tiny size where they train."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from leanmill.cli.main import main


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
TINY = (
    "train.total_tokens=2048",
    "batch.tokens_per_step=1024",
    "batch.tokens_per_micro_batch=512",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.vocab_size=512",
    "data.tokenizer.vocab_size=512",
    "data.tokenizer.num_training_bytes=100000",
    "data.source.max_bytes=200000",
    "eval.tokens_per_domain=512",
)


def _matching(start):
    return [command for command in COMMANDS if command.startswith(start)]


def test_every_command_is_of_a_known_kind():
    kinds = ("make ", "leanmill ", "torchrun ", "git clone ", "pip install ")
    assert COMMANDS
    assert not [command for command in COMMANDS if not command.startswith(kinds)]


@pytest.mark.parametrize("command", _matching("leanmill "))
def test_leanmill_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    if "--out" in arguments:
        arguments[arguments.index("--out") + 1] = str(tmp_path / "out")
    assert main(arguments) == 0


@pytest.mark.parametrize("target", re.findall(r"`make (\w+)`", README) + [c.split()[1] for c in _matching("make ")])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_train_starts_the_command_the_readme_shows():
    recipe_line = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "torchrun --nproc-per-node 2 launch/train.py --config recipes/quickstart.yaml" in recipe_line


@pytest.mark.parametrize(("given", "processes", "threads"), [(None, 1, None), (None, 10_000, 1), ("3", 2, 3)])
def test_make_train_gives_each_process_its_share_of_the_cores(given, processes, threads):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    command = ["make", "-n", "train", f"NPROC={processes}"]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment).stdout
    assert f"OMP_NUM_THREADS={threads or len(os.sched_getaffinity(0))} " in line


@pytest.mark.timeout(400)
@pytest.mark.xdist_group("end_to_end")
@pytest.mark.parametrize("command", _matching("torchrun "))
def test_torchrun_commands(command, tmp_path):
    arguments = shlex.split(command)[1:]
    overrides = [*TINY, f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/report.html").is_file()
    assert "report.html" in done.stdout + done.stderr


@pytest.mark.parametrize("path", re.findall(r"^\| `([\w./]+)`", README, re.M))
def test_paths_of_the_table_exist(path):
    assert (ROOT / path).exists() or (ROOT / "leanmill" / path).exists()
