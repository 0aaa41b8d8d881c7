import importlib.util
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml


ROOT = Path(__file__).parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _load("render")
RECIPE = str(ROOT / "recipes" / "pretrain_1b.yaml")
SIZE = ["--nodes", "4", "--gpus-per-node", "8"]


def _render(capsys, *args):
    assert render.main([*args]) == 0
    return capsys.readouterr().out


def test_slurm_script_is_clean_bash_with_the_settings(capsys, tmp_path):
    overrides = ["name=My run/1".replace("/", "_"), "cluster.init_timeout_seconds=777", "run_dir=runs/a b"]
    text = _render(capsys, "slurm", RECIPE, *SIZE, *overrides, "--max-restarts", "2")
    script = tmp_path / "job.sh"
    script.write_text(text)
    check = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    for part in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --job-name=my-run-1",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "srun --kill-on-bad-exit=1 --cpus-per-task=64 torchrun",
        "--rdzv-backend c10d",
        "--max-restarts 2",
        "777 s until the first step",
        "TORCH_NCCL_DUMP_ON_TIMEOUT=1",
        '"runs/a b/flight_recorder/rank_"',
        "'run_dir=runs/a b'",
    ):
        assert part in text
    assert "$name" not in text


def test_slurm_script_hands_every_word_to_torchrun(capsys, tmp_path):
    """Run the script with stand-ins for Slurm's commands and read what torchrun would get."""
    tricky = 'name=it\'s "$HOME" `x`'
    text = _render(capsys, "slurm", RECIPE, "--nodes", "2", "--gpus-per-node", "4", tricky)
    _stand_ins(
        tmp_path,
        srun='shift 2; exec "$@"',
        scontrol="echo first; echo second",
        torchrun='printf "%s\\n" "$@"; echo "store=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"',
    )
    script = tmp_path / "job.sh"
    script.write_text(text)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "HOME": "/nowhere",
    }
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert tricky in lines
    assert "first:23456" in lines
    assert "store=1" in lines
    assert lines[lines.index("--nproc-per-node") + 1] == "4"


def _stand_ins(folder, **bodies):
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(("ending", "is_requeued"), [(1, True), (0, False)])
def test_a_job_that_runs_out_of_time_saves_and_is_put_back(capsys, tmp_path, ending, is_requeued):
    script = tmp_path / "job.sh"
    script.write_text(_render(capsys, "slurm", RECIPE, *SIZE))
    _stand_ins(
        tmp_path,
        # Steps get signals from Slurm; this one saves for a while before it ends.
        srun=f"""trap 'sleep 0.3; echo saved; exit {ending}' TERM
        echo $$ > step; touch started; while true; do sleep 0.05; done""",
        scancel='echo "scancel $*"; kill -TERM "$(cat step)"',
        scontrol='[[ $1 == show ]] && echo first || echo "scontrol $*"',
    )
    job = subprocess.Popen(
        ["bash", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "n"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    told, _ = job.communicate(timeout=60)
    assert "scancel --signal=TERM 7.0" in told
    assert told.index("the time limit is near") < told.index("saved")
    assert ("scontrol requeue 7" in told) == is_requeued
    assert job.returncode == ending


def test_a_job_that_fails_is_not_put_back(capsys, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(_render(capsys, "slurm", RECIPE, *SIZE))
    _stand_ins(tmp_path, srun="exit 2", scontrol='[[ $1 == show ]] && echo first || echo "scontrol $*"')
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "requeue" not in done.stdout


def test_variables_memory_and_numbers_of_machines_reach_both(capsys, tmp_path):
    asked = ["--env", "NCCL_IB_HCA=mlx5 $x", "--memory-gib-per-gpu", "100", "--min-nodes", "2", "--nodes", "2"]
    text = _render(capsys, "slurm", RECIPE, *asked, "--gpus-per-node", "8")
    assert "#SBATCH --mem=800G" in text
    assert "export NCCL_IB_HCA='mlx5 $x'" in text
    elastic = ["batch.tokens_per_step=98304", "--min-nodes", "1", "--nodes", "3", "--gpus-per-node", "1"]
    assert "#SBATCH --nodes=1-3" in _render(capsys, "slurm", RECIPE, *elastic)
    job = yaml.safe_load(_render(capsys, "k8s", RECIPE, *elastic, *asked[:4]))
    policy, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert (policy["minReplicas"], policy["maxReplicas"], worker["replicas"]) == (1, 3, 3)
    container = worker["template"]["spec"]["containers"][0]
    assert {"name": "NCCL_IB_HCA", "value": "mlx5 $x"} in container["env"]
    assert container["resources"]["requests"] == {"cpu": 8, "memory": "100Gi"}


def test_k8s_takes_secrets_and_a_volume_for_downloads(capsys):
    given = ["--secret", "tokens", "--secret", "s3", "--cache-claim", "hub", "--cache-mount", "/c"]
    job = yaml.safe_load(_render(capsys, "k8s", RECIPE, *SIZE, *given))
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    container = pod["containers"][0]
    assert [one["secretRef"]["name"] for one in container["envFrom"]] == ["tokens", "s3"]
    assert {"name": "HF_HOME", "value": "/c"} in container["env"]
    assert {"name": "cache", "mountPath": "/c"} in container["volumeMounts"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "hub"}} in pod["volumes"]
    records = next(one["value"] for one in container["env"] if one["name"] == "TORCH_FR_DUMP_TEMP_FILE")
    assert records.startswith(container["volumeMounts"][0]["mountPath"]), "a pod's own disk goes with it"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--min-nodes", "5"], "--min-nodes is 5; give 1 to 4"),
        (["--min-nodes", "2"], "with 3 of 4 nodes: batch.tokens_per_step="),
        (["--env", "IB"], "--env 'IB' is no NAME=VALUE"),
    ],
)
def test_what_cannot_be_rendered_is_refused(capsys, args, message):
    assert render.main(["slurm", RECIPE, *SIZE, *args]) == 2
    assert message in capsys.readouterr().err


def test_k8s_job_parses_and_holds_the_settings(capsys):
    off = ["cluster.flight_recorder=false", "cluster.hang_seconds=null", "cluster.slow_rank_factor=null"]
    text = _render(capsys, "k8s", RECIPE, *SIZE, *off, "--image", 'reg/x:1"')
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["minReplicas"] == 4
    assert job["spec"]["nprocPerNode"] == "8"
    container = worker["template"]["spec"]["containers"][0]
    assert container["image"] == 'reg/x:1"'
    assert container["command"][:3] == ["torchrun", "launch/train.py", "--config"]
    assert container["command"][-3:] == off
    env = {item["name"]: item["value"] for item in container["env"]}
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert all(isinstance(value, str) for value in env.values())
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def _slurm_environment(text):
    exports = [line.removeprefix("export ").split("=", 1) for line in text.splitlines() if line.startswith("export ")]
    return dict(exports)


def _k8s_environment(text):
    pod = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 444
    return {item["name"]: item["value"] for item in pod["containers"][0]["env"]}


@pytest.mark.parametrize(("kind", "environment"), [("slurm", _slurm_environment), ("k8s", _k8s_environment)])
def test_torchrun_reads_how_long_ranks_may_save_and_which_signals_reach_them(capsys, monkeypatch, kind, environment):
    from torch.distributed import run

    text = _render(capsys, kind, RECIPE, *SIZE, "--warn-seconds", "444")
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, environment(text)[name])
    config, _, _ = run.config_from_args(run.parse_args(["launch/train.py"]))
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(config.signals_to_handle.split(","))
    if torch.__version__ >= "2.12":  # before, torchrun has no such setting
        assert config.shutdown_timeout == 444


@pytest.mark.parametrize("kind", ["slurm", "k8s"])
def test_a_batch_that_does_not_divide_is_refused(capsys, kind):
    assert render.main([kind, RECIPE, "--nodes", "3", "--gpus-per-node", "7"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: batch.tokens_per_step=1048576 is no multiple")
    assert captured.out == ""


def test_writes_a_file(capsys, tmp_path):
    out = tmp_path / "job.yaml"
    assert "kubectl apply -f" in _render(capsys, "k8s", RECIPE, *SIZE, "--out", str(out))
    assert yaml.safe_load(out.read_text())["metadata"]["name"] == "pretrain-1b"
