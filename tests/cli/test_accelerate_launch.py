"""A run that `accelerate launch` starts is the recipe's, or refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leanmill import api
from leanmill.cli.accelerate_launch import check_accelerate
from leanmill.core.errors import ConfigError
from tests.test_api import raw


@pytest.mark.parametrize(
    ("overrides", "asked", "said"),
    [
        ([], {"ACCELERATE_USE_FSDP": "true"}, r"asked for fsdp, .*engine.type=auto; add engine=fsdp"),
        (["engine=ddp"], {"ACCELERATE_USE_DEEPSPEED": "true"}, r"asked for deepspeed, .*engine=deepspeed"),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, r"mixed precision fp16, .*train.precision=fp32"),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed precision bf16, .*train.precision=fp32"),
    ],
)
def test_what_accelerate_was_asked_for_and_the_recipe_does_not_say_is_refused(tmp_path, overrides, asked, said):
    with pytest.raises(ConfigError, match=said):
        check_accelerate(api.load_recipe(raw(tmp_path), *overrides), asked)


def test_what_agrees_with_the_recipe_is_started(tmp_path):
    recipe = api.load_recipe(raw(tmp_path), "engine=fsdp", "train.precision=bf16")
    asked = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"}
    check_accelerate(recipe, asked, ["python", "/bin/accelerate", "launch", "--num_processes", "2"])
    check_accelerate(recipe, {"ACCELERATE_MIXED_PRECISION": "no"}, ["bash", "--num_processes", "2"])


@pytest.mark.parametrize("flag", [["--num_processes", "2"], ["--num-processes=2"]])
def test_one_process_where_two_were_asked_for_is_refused(tmp_path, flag):
    command = ["python", "/bin/accelerate", "launch", "--cpu", *flag, "launch/train.py"]
    with pytest.raises(ConfigError, match="starts one process, not the 2 .* leanmill launch"):
        check_accelerate(api.load_recipe(raw(tmp_path)), {"ACCELERATE_USE_CPU": "True"}, command)


@pytest.mark.slow
def test_accelerate_launch_trains_as_torchrun_does(tmp_path):
    import json

    given, root = raw(tmp_path), Path(__file__).parents[2]
    (tmp_path / "recipe.json").write_text(json.dumps(given))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    shared = ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
    script = ["launch/train.py", "--config", str(tmp_path / "recipe.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}

    def start(*command):
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False
        )

    fsdp = ["--use_fsdp", "--fsdp_version", "2"]
    assert start(*accelerate, *shared, *fsdp, *script, "engine=fsdp", f"run_dir={tmp_path}/a").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert start(*torchrun, *script, "engine=fsdp", f"run_dir={tmp_path}/b").returncode == 0
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in "ab"
    ]
    assert losses[0] == losses[1]
    refused = start(*accelerate, *shared, "--cpu", *script, f"run_dir={tmp_path}/c")
    assert "starts one process, not the 2" in refused.stderr
