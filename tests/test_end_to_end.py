"""Whole runs as a user starts them: killed and resumed, exported, evaluated, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from leanmill.checkpoint.reading import read_full_state
from leanmill.cli.main import main
from leanmill.trainer.run_lock import RunLock
from tests.kills import fork_train
from tests.processes import children_of, is_running


ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
name: tiny
run_dir: {run_dir}
device: cpu
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 2, max_position_embeddings: 128, tie_word_embeddings: true}}
data:
  sequence_length: 64
  cache_dir: {cache}
  tokenizer: {{vocab_size: 512, num_training_bytes: 100000}}
  source: {{type: local_corpus, max_bytes: 200000, validation_fraction: 0.2}}
techniques:
  - {{type: nm_sparsity}}
  - {{type: ternary}}
engine: {{type: {engine}}}
batch: {{tokens_per_step: 512, tokens_per_micro_batch: 128}}
train: {{steps: {steps}, precision: fp32, deterministic: true}}
eval: {{every_steps: null, tokens_per_domain: 512}}
checkpoint: {{every_steps: 2, keep_last: 8}}
log: {{every_steps: 1, tensorboard: false}}
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def write_recipe(folder, cache, engine="single", steps=10, name="run"):
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(run_dir=folder / name, cache=cache, engine=engine, steps=steps), encoding="utf-8")
    return path


def launch(recipe, *overrides, num_ranks=2):
    """Start torchrun in a process group of its own, so that all of it can be killed at once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*torchrun, str(ROOT / "launch/train.py"), "--config", str(recipe), *overrides]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process, timeout_seconds=240):
    output, _ = process.communicate(timeout=timeout_seconds)
    assert process.returncode == 0, output[-4000:]
    return output


def losses(run_dir):
    """The last loss recorded for each step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["losses"]["total"] for record in records if record["kind"] == "step"}


def wait_for(condition, timeout_seconds=200):
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("end_to_end")
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bitwise(engine, tmp_path, cache):
    steps = 40
    whole, broken = (write_recipe(tmp_path, cache, engine, steps, name) for name in ("whole", "broken"))
    finish(launch(whole))
    process = launch(broken)
    try:
        saved = (tmp_path / "broken/checkpoints").glob
        wait_for(lambda: any(saved("step-*/manifest.json")) or process.poll() is not None)
        assert process.poll() is None, "ended before it could be killed: raise `steps`"
        ranks = children_of(process.pid)
    finally:
        # torchrun alone: its ranks are in sessions of their own, and have to end by themselves.
        process.kill()
        process.wait()
    assert len(ranks) == 2
    wait_for(lambda: not any(is_running(pid) for pid in ranks), timeout_seconds=20)
    done_before = max(losses(tmp_path / "broken"))
    assert done_before < steps, "the run was over before it was killed: raise `steps`"
    output = finish(launch(broken))
    assert "resumed" in output
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert expected == got
    last = f"checkpoints/step-{steps:08d}"
    for part in ("model", "optimizer"):
        a, b = (read_full_state(tmp_path / name / last, part) for name in ("whole", "broken"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.timeout(400)
@pytest.mark.xdist_group("end_to_end")
def test_a_run_continues_on_another_number_of_ranks(tmp_path, cache):
    recipe = write_recipe(tmp_path, cache, "fsdp", 6)
    finish(launch(recipe, "train.steps=4", "schedule.type=constant"))
    output = finish(launch(recipe, "train.steps=6", "schedule.type=constant", "engine=single", num_ranks=1))
    assert "resumed" in output
    whole = write_recipe(tmp_path, cache, "single", 6, "whole")
    finish(launch(whole, "schedule.type=constant", num_ranks=1))
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert expected.keys() == got.keys() == set(range(1, 7))
    assert all(abs(expected[step] - got[step]) < 1e-4 for step in expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("end_to_end")
def test_a_run_goes_on_where_other_numbers_of_ranks_share_matmuls(tmp_path, cache, capsys):
    """Bitwise at the same layout; from one process to two ranks that share matmuls, back, and to four with shards too.

    What is scored and said in training is what a process scores and says that reads the checkpoint.
    """
    names = ("whole", "broken", "moved")
    whole, broken, moved = (write_recipe(tmp_path, cache, "ddp", 6, name) for name in names)
    options = ("schedule.type=constant", "eval.prompts=[def main, import]", "eval.prompt_tokens=4")
    shared = (*options, "layout.tp=2")
    finish(launch(whole, *shared))
    finish(launch(broken, *shared, "train.steps=3"))
    assert "resumed" in finish(launch(broken, *shared))
    finish(launch(moved, *options, "engine=single", "train.steps=2", num_ranks=1))
    assert "resumed" in finish(launch(moved, *shared, "train.steps=4"))
    assert "resumed" in finish(launch(moved, *options, "engine=single", "train.steps=5", num_ranks=1))
    assert "resumed" in finish(launch(moved, *shared, "engine=fsdp", num_ranks=4))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    for part in ("model", "optimizer"):
        states = [read_full_state(tmp_path / name / "checkpoints/step-00000006", part) for name in names]
        assert states[0].keys() == states[1].keys() == states[2].keys()
        for key, value in states[0].items():
            assert torch.equal(states[1][key], value)
            torch.testing.assert_close(states[2][key], value, rtol=0, atol=2e-5)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(tmp_path / "whole"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = (tmp_path / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [record for record in map(json.loads, lines) if record["kind"] == "eval"][-1]
    assert found["domains"]["all"]["loss"] == pytest.approx(last["domains"]["all"]["loss"], rel=1e-6)
    assert found["samples"] == last["samples"]
    assert main(["export", "--checkpoint", str(tmp_path / "whole"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("end_to_end")
def test_a_run_goes_on_where_ranks_share_rows(tmp_path, cache):
    """From two ranks that share rows to one process and back: the losses of one process, on the same tokens."""
    alone, shared, moved = (write_recipe(tmp_path, cache, "ddp", 6, name) for name in ("alone", "shared", "moved"))
    constant, rows = "schedule.type=constant", "layout.cp=2"
    finish(launch(alone, constant, "engine=single", num_ranks=1))
    finish(launch(shared, constant, rows, "layout.cp_attention=all_gather"))
    finish(launch(moved, constant, rows, "layout.cp_attention=all_gather", "train.steps=2"))
    assert "resumed" in finish(launch(moved, constant, "engine=single", "train.steps=4", num_ranks=1))
    assert "resumed" in finish(launch(moved, constant, rows, "layout.cp_attention=all_gather"))
    expected = losses(tmp_path / "alone")
    for name in ("shared", "moved"):
        got = losses(tmp_path / name)
        assert got.keys() == expected.keys()
        assert all(abs(expected[step] - got[step]) < 1e-4 for step in expected), (name, expected, got)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("end_to_end")
def test_a_run_goes_on_where_ranks_have_blocks(tmp_path, cache, capsys):
    """From two stages to one process and to two stages sharded twice, and exported: as one process would have."""
    names = ("alone", "whole", "broken", "moved")
    alone, whole, broken, moved = (write_recipe(tmp_path, cache, "ddp", 6, name) for name in names)
    options = ("schedule.type=constant", "techniques=[{type: nm_sparsity, decay: 0.0}]", "optimizer.eps=1.0e-3")
    parts = (*options, "layout.pp=2")
    finish(launch(alone, *options, "engine=single", num_ranks=1))
    finish(launch(whole, *parts))
    finish(launch(broken, *parts, "train.steps=3"))
    assert "resumed" in finish(launch(broken, *parts))
    finish(launch(moved, *parts, "train.steps=2"))
    assert "resumed" in finish(launch(moved, *options, "engine=single", "train.steps=4", num_ranks=1))
    assert "resumed" in finish(launch(moved, *parts, "engine=fsdp", num_ranks=4))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    for part in ("model", "optimizer"):
        states = [read_full_state(tmp_path / name / "checkpoints/step-00000006", part) for name in names]
        assert all(state.keys() == states[0].keys() for state in states)
        for key, value in states[0].items():
            assert torch.equal(states[1][key], states[2][key]), key
            for state in states[1:]:
                torch.testing.assert_close(state[key], value, rtol=0, atol=2e-5)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(tmp_path / "whole"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = (tmp_path / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [record for record in map(json.loads, lines) if record["kind"] == "eval"][-1]
    assert found["domains"]["all"]["loss"] == pytest.approx(last["domains"]["all"]["loss"], rel=1e-6)
    assert found["samples"] == last["samples"]
    assert main(["export", "--checkpoint", str(tmp_path / "whole"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0


@pytest.mark.xdist_group("end_to_end")
def test_sigterm_finishes_the_step_and_saves(tmp_path, cache):
    process = launch(write_recipe(tmp_path, cache, "ddp", 100_000))
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 3)
    # torchrun hands SIGTERM on to its ranks.
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    newest = max((tmp_path / "run/checkpoints").glob("step-*"))
    state = json.loads((newest / "train_state.json").read_text())
    assert state["step"] == max(losses(tmp_path / "run")), output[-2000:]
    assert (newest / "manifest.json").exists()


@pytest.mark.xdist_group("end_to_end")
def test_ctrl_c_saves_and_exits_130(tmp_path, cache):
    recipe = write_recipe(tmp_path, cache, "single", 100_000)
    command = [sys.executable, "-m", "leanmill", "train", str(recipe), "checkpoint.every_steps=null"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output[-4000:]
    assert "KeyboardInterrupt" not in output
    assert "SIGINT: stopping after this step and its checkpoint, for 120 s at most" in output
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["status"] == "stopped"
    assert (tmp_path / f"run/checkpoints/step-{max(losses(tmp_path / 'run')):08d}/manifest.json").exists()


@pytest.mark.xdist_group("end_to_end")
def test_an_error_of_all_ranks_is_one_line(tmp_path, cache):
    process = launch(write_recipe(tmp_path, cache, "ddp"), "batch.tokens_per_step=640")
    output, _ = process.communicate(timeout=120)
    told = [line for line in output.splitlines() if "is no multiple of" in line]
    assert [line.split("batch.")[0].strip() for line in told] == ["error:", "traceback : error:"], output
    assert "exitcode  : 2 " in output
    assert "<NO_OTHER_FAILURES>" in output


@pytest.mark.xdist_group("end_to_end")
def test_commands_over_one_run(tmp_path, cache, capsys):
    recipe = write_recipe(tmp_path, cache, "single", 4)
    run_dir = tmp_path / "run"
    assert main(["check", str(recipe)]) == 0
    assert main(["plan", str(recipe)]) == 0
    assert main(["train", str(recipe)]) == 0
    assert (run_dir / "report.html").stat().st_size > 10_000
    newest = run_dir / "checkpoints/step-00000004"
    capsys.readouterr()
    lock = RunLock(run_dir)
    lock.acquire()  # as if it were still running: a second run is refused, reading goes on
    assert main(["train", str(recipe)]) == 2
    refusal = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in refusal] == ["error"]
    assert f"in use: process {os.getpid()}" in refusal[0]
    assert main(["eval", "--checkpoint", str(run_dir), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    recorded = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in recorded if record["kind"] == "eval"][-1]["domains"]["all"]
    found = scores.get("domains", scores)["all"]
    assert found["loss"] == pytest.approx(last["loss"], abs=1e-5)
    for form in ("hf", "bitnet", "packed"):
        out = tmp_path / f"export-{form}"
        assert main(["export", "--checkpoint", str(newest), "--to", form, "--out", str(out)]) == 0
        assert (out / "config.json").is_file()
    assert main(["report", str(run_dir)]) == 0
    lock.release()
    assert not (run_dir / "run.lock").exists()


@pytest.mark.xdist_group("end_to_end")
def test_of_two_runs_started_at_once_one_trains(tmp_path, cache):
    recipe, steps = write_recipe(tmp_path, cache, "single", 20), 20
    runs = [fork_train(recipe, tmp_path / f"{number}.log") for number in range(2)]
    codes = [run.wait() for run in runs]
    assert sorted(codes) == [0, 2], [run.output for run in runs]
    trained, refused = runs[codes.index(0)], runs[codes.index(2)]
    line = f"error: run_dir={tmp_path}/run is in use: process {trained.pid} on "
    assert [text[: len(line)] for text in refused.output.splitlines()] == [line]
    records = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, steps + 1))
    assert [record["kind"] for record in records if record["kind"] in ("start", "end")] == ["start", "end"]


@pytest.mark.xdist_group("end_to_end")
def test_a_non_finite_step_changes_nothing_and_stops(tmp_path, cache, capsys):
    recipe = write_recipe(tmp_path, cache, "single", 4)
    assert (
        main(
            [
                "train",
                str(recipe),
                "optimizer.lr=1e30",
                "optimizer.weight_decay=0",
                "schedule.warmup_steps=0",
                "techniques=[]",
            ]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "non-finite" in error
    assert "train.non_finite=skip" in error
    skipping = ["train", str(recipe), "train.non_finite=skip", f"run_dir={tmp_path}/skipping"]
    broken = ["optimizer.lr=1e30", "optimizer.weight_decay=0", "schedule.warmup_steps=0", "techniques=[]"]
    for _ in range(2):  # the second finds nothing left to train, which makes it no better
        assert main([*skipping, *broken]) == 1
        error = capsys.readouterr().err
        assert "most steps were skipped as non-finite or as spikes, " in error
        assert "the checkpoint of step 4 is saved" in error
    records = [json.loads(line) for line in (tmp_path / "skipping/metrics.jsonl").read_text().splitlines()]
    assert [record for record in records if record["kind"] == "step"][-1]["skipped_steps"] >= 3
    assert (tmp_path / "skipping/checkpoints/step-00000004/manifest.json").is_file()


@pytest.mark.xdist_group("end_to_end")
def test_a_resume_says_what_changed_and_refuses_what_was_not_accepted(tmp_path, cache, capsys):
    recipe, run_dir = write_recipe(tmp_path, cache, "single", 2), tmp_path / "run"
    length = ["train.steps=null", "train.total_tokens=2048"]
    assert main(["train", str(recipe), "techniques=[]"]) == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", str(recipe), *length, "optimizer.lr=1e-4"]) == 2
    refusal = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(refusal) == 1
    assert "techniques.nm_sparsity not set -> {" in refusal[0]
    assert "techniques.ternary not set -> {" in refusal[0]
    assert "optimizer.lr 0.001 -> 0.0001" in refusal[0]
    assert "train.steps" not in refusal[0]
    accept = "checkpoint.accept_changes=[techniques.nm_sparsity,techniques.ternary,optimizer.lr]"
    assert f"'{accept}'" in refusal[0]
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    # 2 steps of 512 tokens are done; what is left of 2048 is one step of 1024.
    wider = ["batch.tokens_per_step=1024", accept.replace("]", ",batch]")]
    assert main(["train", str(recipe), *length, "optimizer.lr=1e-4", "log.report=false", *wider]) == 0
    said = " ".join(
        line.partition(" ")[2].partition(" ")[2] for line in capsys.readouterr().err.splitlines()
    )  # no time
    said = " ".join(said.split())
    for change in ("train.total_tokens null -> 2048", "log.report True -> False", "batch.tokens_per_step 512 -> 1024"):
        assert change in said
    notes = [json.loads(line).get("notes") for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("optimizer.lr 0.001 -> 0.0001" in note for group in notes if group for note in group)
    state = json.loads((run_dir / "checkpoints/step-00000003/train_state.json").read_text())
    assert (state["step"], state["num_steps"], state["tokens"]) == (3, 3, 2048)
    assert (run_dir / "recipe.1.yaml").read_bytes() == before[run_dir / "recipe.yaml"]
    assert "ternary" in (run_dir / "recipe.yaml").read_text()
    # Accepted changes are the run's recipe now.
    assert main(["train", str(recipe), *length, "optimizer.lr=1e-4", "log.report=false", wider[0]]) == 0
