"""Runs killed at many moments and started again end as if nothing had happened, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from leanmill.checkpoint.finding import complete_checkpoints
from leanmill.cli.main import main
from tests.kills import (
    POINTS,
    Child,
    Counted,
    Moment,
    assert_bitwise,
    assert_continues,
    assert_tidy,
    copy_run,
    count_points,
    fork_ranks,
    fork_train,
    holder_of,
    newest_step,
    records,
)
from tests.processes import children_of, is_running
from tests.test_end_to_end import launch, wait_for


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("kills")]
SEED = 7
STEPS = 8
TORCHRUN_STEPS = 40
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
batch: {{tokens_per_step: 256, tokens_per_micro_batch: 128}}
train: {{steps: {steps}, precision: fp32, deterministic: true}}
eval: {{every_steps: 4, tokens_per_domain: 64}}
checkpoint: {{every_steps: 2, keep_last: {keep_last}, asynchronous: true}}
log: {{every_steps: 1, tensorboard: false}}
"""


class House:
    """One folder of runs that share a cache."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def recipe(self, name: str, *, engine: str = "single", steps: int = STEPS, keep_last: int = 2) -> Path:
        """Write the recipe of the run `name`."""
        path = self.root / f"{name}.yaml"
        path.write_text(
            RECIPE.format(
                run_dir=self.root / name, cache=self.root / "cache", engine=engine, steps=steps, keep_last=keep_last
            ),
            encoding="utf-8",
        )
        return path

    def log(self, name: str) -> Path:
        """Return where the run's output goes."""
        return self.root / f"{name}.log"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Also imports everything into this process, by an uninterrupted run of one process: `whole`."""
    house = House(tmp_path_factory.mktemp("kills"))
    assert main(["train", str(house.recipe("whole"))]) == 0
    return house


def end_by(child: Child, moment: Moment) -> bool:
    """Wait for a run's end; return whether the signal came before it, and check what the end was like."""
    code = child.wait()
    if code == 0 and moment.signal == signal.SIGKILL:
        return False
    allowed = {
        signal.SIGKILL: (-signal.SIGKILL,),
        # Before training begins there is nothing to save, and the process ends as any other.
        signal.SIGTERM: (0, -signal.SIGTERM),
        signal.SIGINT: (130,),
    }
    assert code in allowed[signal.Signals(moment.signal)], f"{moment}: exit code {code}\n{child.output[-3000:]}"
    return code != 0 or "stopped after" in child.output


def survive(house: House, name: str, recipe: Path, moments: Sequence[Moment], counted: Counted) -> None:
    """Run a recipe, ended by each of `moments` in turn, then to its end, and compare."""
    run_dir = house.root / name
    for moment in [*moments, None]:
        step, dead = newest_step(run_dir), holder_of(run_dir)
        child = fork_train(recipe, house.log(name), prepare=moment.arm if moment else lambda: None)
        if moment is None:
            assert child.wait() == 0, child.output[-4000:]
        elif end_by(child, moment):
            counted.kills[f"{signal.Signals(moment.signal).name} at {moment.point}"] += 1
        elif moment is moments[0]:
            raise AssertionError(f"never came past {moment}\n{child.output[-2000:]}")
        assert_continues(child.output, run_dir, step, dead)
        if "stopped after" in child.output:
            assert newest_step(run_dir) == max(record["step"] for record in records(run_dir, "step"))
    assert_bitwise(run_dir, house.root / "whole", STEPS)
    assert_tidy(run_dir)
    counted.bitwise += 1


@pytest.fixture(scope="module")
def passes(house):
    """How often a whole run of one process comes past each point."""
    path = house.root / "counts.json"
    child = fork_train(house.recipe("counted"), house.log("counted"), prepare=lambda: count_points(path))
    assert child.wait() == 0, child.output
    return json.loads(path.read_text(encoding="utf-8"))


def in_a_resume(chance: random.Random) -> Moment:
    """A moment early enough for a run that has only its last steps to do."""
    early = [("load", 2), ("verify", 1), ("text", 3), ("rename", 2), ("unlink", 4), ("fsync", 12), ("update", 2)]
    point, last = chance.choice([*early, ("tensors", 40), ("displace", 1), ("record", 3), ("mkdir", 3)])
    return Moment(point, chance.randint(1, last), chance.choice(["before", "after"]))


def test_killed_at_every_point_and_again_in_the_resume(house, passes):
    chance, counted = random.Random(SEED), Counted()
    cases = [(point, "before" if chance.random() < 0.5 else "after") for point in POINTS if passes.get(point)]
    cases += [("text", "half"), ("tensors", "half"), ("record", "half"), ("rename", "after"), ("fsync", "before")]
    for number, (point, when) in enumerate(cases):
        first = Moment(point, chance.randint(1, passes[point]), when)
        moments = [first, in_a_resume(chance)]
        print(number, *moments, sep=", ")
        survive(house, f"point-{number}", house.recipe(f"point-{number}"), moments, counted)
    print(counted)
    assert counted.kills.total() > len(cases) * 1.5


def test_told_to_stop_at_many_moments(house, passes):
    chance, counted = random.Random(SEED), Counted()
    for number, name in enumerate(["SIGTERM", "SIGINT"] * 3):
        points = chance.sample(["backward", "update", "fsync", "rename", "tensors", "evaluate", "verify", "text"], 2)
        moments = [
            Moment(point, chance.randint(1, max(1, passes[point] // 2)), "before", signal.Signals[name])
            for point in points
        ]
        print(number, *moments, sep=", ")
        survive(house, f"told-{number}", house.recipe(f"told-{number}"), moments, counted)
    print(counted)


def test_killed_at_random_times(house):
    chance, counted = random.Random(SEED), Counted()
    started = time.monotonic()
    assert fork_train(house.recipe("timed"), house.log("timed")).wait() == 0
    seconds = time.monotonic() - started
    for number in range(3):
        name, times = f"time-{number}", []
        recipe, run_dir = house.recipe(name), house.root / name
        for _ in range(3):
            step, dead = newest_step(run_dir), holder_of(run_dir)
            child = fork_train(recipe, house.log(name))
            times.append(chance.uniform(0, seconds))
            time.sleep(times[-1])
            os.kill(child.pid, signal.SIGKILL)
            if child.wait() == -signal.SIGKILL:
                counted.kills["SIGKILL at any time"] += 1
        step, dead = newest_step(run_dir), holder_of(run_dir)
        child = fork_train(recipe, house.log(name))
        assert child.wait() == 0, (times, child.output[-4000:])
        assert_continues(child.output, run_dir, step, dead)
        assert_bitwise(run_dir, house.root / "whole", STEPS)
        assert_tidy(run_dir)
        counted.bitwise += 1
    print(counted)


@pytest.fixture(scope="module")
def half_way(house):
    """A run that was killed at step 6, with all its checkpoints: 2, 4 and 6."""
    child = fork_train(
        house.recipe("half-way", keep_last=8), house.log("half-way"), prepare=Moment("rename", 3, "after").arm
    )
    assert child.wait() == -signal.SIGKILL
    folder = house.root / "half-way"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (2, 4, 6)]
    return folder


def test_killed_while_a_step_is_saved_again(house, half_way):
    """Each save of a step that is there takes three renames: old away, new in place, old to be deleted."""
    counted = Counted()
    moments = [Moment("rename", count, when) for count in (1, 2, 3, 4, 5, 6) for when in ("before", "after")]
    moments += [Moment("unlink", 3), Moment("unlink", 8), Moment("fsync", 12), Moment("tensors", 60, "half")]
    for number, (first, second) in enumerate(zip(moments[::2], moments[1::2], strict=True)):
        print(number, first, second, sep=", ")
        name = f"again-{number}"
        run_dir = house.root / name
        recipe = copy_run(half_way, run_dir)
        back = f"checkpoint.resume={run_dir}/checkpoints/step-00000002"
        for moment in (first, second):
            dead = holder_of(run_dir)
            child = fork_train(recipe, house.log(name), back, prepare=moment.arm)
            assert child.wait() == -signal.SIGKILL, f"{moment}\n{child.output}"
            assert_continues(child.output, run_dir, 2, dead)
            steps = [manifest.step for _, manifest in complete_checkpoints(run_dir / "checkpoints")]
            assert set(steps) >= {2, 4, 6}, f"{moment}: a checkpoint was lost"
            counted.kills[f"SIGKILL at {moment.point}, saved again"] += 1
        step, dead = newest_step(run_dir), holder_of(run_dir)
        child = fork_train(recipe, house.log(name))
        assert child.wait() == 0, child.output[-4000:]
        assert_continues(child.output, run_dir, step, dead)
        assert_bitwise(run_dir, house.root / "whole", STEPS)
        assert_tidy(run_dir)
        counted.bitwise += 1
    print(counted)


def test_killed_while_a_damaged_checkpoint_is_replaced(house, half_way):
    counted = Counted()
    for number, moment in enumerate([Moment("rename", 1, "after"), Moment("rename", 2), Moment("rename", 3)]):
        name = f"damaged-{number}"
        run_dir = house.root / name
        recipe = copy_run(half_way, run_dir)
        newest = next((run_dir / "checkpoints/step-00000006/optimizer").glob("*.safetensors"))
        newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
        for each in (moment, None):
            child = fork_train(recipe, house.log(name), prepare=each.arm if each else lambda: None)
            assert child.wait() == (-signal.SIGKILL if each else 0), child.output[-4000:]
        counted.kills["SIGKILL at rename, damaged before"] += 1
        assert_bitwise(run_dir, house.root / "whole", STEPS)
        assert_tidy(run_dir)
        counted.bitwise += 1
    print(counted)


def test_killed_while_the_cache_is_made(house, passes):
    chance, counted = random.Random(SEED), Counted()
    for number, (point, count) in enumerate([("replace", 2), ("rename", 1), ("text", 2), ("mkdir", 6), ("replace", 5)]):
        name = f"uncached-{number}"
        recipe = house.recipe(name)
        recipe.write_text(recipe.read_text().replace(str(house.root / "cache"), str(house.root / f"{name}-cache")))
        moment = Moment(point, count, chance.choice(["before", "after"]))
        print(number, moment)
        survive(house, name, recipe, [moment], counted)
    print(counted)


def end_ranks(ranks: Sequence[Child], killed: int) -> None:
    """Wait for all ranks: one was killed, and the others must notice by themselves."""
    outputs = "\n".join(rank.output[-2000:] for rank in ranks)
    assert ranks[killed].wait() == -signal.SIGKILL, outputs
    for number, rank in enumerate(ranks):
        if number != killed:
            assert rank.wait(60) not in (0, 99), rank.output[-3000:]


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_one_of_two_ranks_is_killed(engine, house):
    whole = f"whole-{engine}"
    ranks = fork_ranks(house.recipe(whole, engine=engine), house.log(whole), 2)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
    counted = Counted()
    cases = [
        [(1, Moment("backward", 7)), (1, Moment("load", 1))],
        [(0, Moment("rename", 2)), (0, Moment("update", 2, "after"))],
        [(1, Moment("tensors", 30, "half") if engine == "fsdp" else Moment("snapshot", 3)), (0, Moment("unlink", 3))],
        [(0, Moment("fsync", 14)), (1, Moment("clip", 1))],
    ]
    for number, moments in enumerate(cases):
        name = f"{engine}-{number}"
        run_dir, recipe = house.root / name, house.recipe(name, engine=engine)
        for killed, moment in moments:
            step, dead = newest_step(run_dir), holder_of(run_dir)
            ranks = fork_ranks(recipe, house.log(name), 2, moments={killed: moment})
            end_ranks(ranks, killed)
            assert_continues(ranks[0].output, run_dir, step, dead)
            counted.kills[f"SIGKILL of rank {killed} at {moment.point}"] += 1
        step, dead = newest_step(run_dir), holder_of(run_dir)
        ranks = fork_ranks(recipe, house.log(name), 2)
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
        assert_continues(ranks[0].output, run_dir, step, dead)
        assert_bitwise(run_dir, house.root / whole, STEPS)
        assert_tidy(run_dir)
        counted.bitwise += 1
    print(counted)


def test_of_two_runs_of_two_ranks_one_trains(house):
    recipe = house.recipe("both", engine="ddp")
    runs = [fork_ranks(recipe, house.log(f"both-{number}"), 2) for number in range(2)]
    codes = [tuple(rank.wait() for rank in run) for run in runs]
    assert sorted(codes) == [(0, 0), (2, 2)], runs[0][0].output + runs[1][0].output
    refused = "".join(rank.output for rank in runs[codes.index((2, 2))])
    assert len(refused.splitlines()) == 1
    assert f"is in use: process {runs[codes.index((0, 0))][0].pid} on " in refused
    assert [record["step"] for record in records(house.root / "both", "step")] == list(range(1, STEPS + 1))


def has_come_to(num_records: int, run_dir: Path, process: subprocess.Popen[str]) -> bool:
    """Whether a run has logged that many steps over all its starts, or is over."""
    return len(list(records(run_dir, "step"))) >= num_records or process.poll() is not None


def hit(target: str, number: int, torchrun: int, ranks: Sequence[int]) -> None:
    """Send a signal to what `target` names."""
    pids = {"torchrun": [torchrun], "all": [torchrun, *ranks], "rank 0": ranks[:1], "rank 1": ranks[1:]}[target]
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.parametrize(
    ("engine", "hits"),
    [
        ("fsdp", [("rank 1", "SIGKILL"), ("all", "SIGKILL"), ("torchrun", "SIGTERM"), ("rank 0", "SIGINT")]),
        ("ddp", [("rank 0", "SIGKILL"), ("torchrun", "SIGKILL"), ("torchrun", "SIGINT"), ("rank 1", "SIGTERM")]),
    ],
)
def test_torchrun_and_its_ranks_are_hit(engine, hits, house):
    chance, whole, name = random.Random(SEED), f"torchrun-whole-{engine}", f"torchrun-{engine}"
    process = launch(house.recipe(whole, engine=engine, steps=TORCHRUN_STEPS))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    recipe, run_dir = house.recipe(name, engine=engine, steps=TORCHRUN_STEPS), house.root / name
    for target, signal_name in hits:
        step, dead = newest_step(run_dir), holder_of(run_dir)
        enough = len(list(records(run_dir, "step"))) + chance.randint(2, 5)
        process = launch(recipe)
        try:
            wait_for(functools.partial(has_come_to, enough, run_dir, process))
            assert process.poll() is None, process.communicate()[0]
            ranks = children_of(process.pid)
            assert len(ranks) == 2
            hit(target, signal.Signals[signal_name], process.pid, ranks)
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        wait_for(lambda ranks=ranks: not any(is_running(pid) for pid in ranks), timeout_seconds=20)
        print(f"{signal_name} to {target}: exit code {process.returncode}")
        assert_continues(output, run_dir, step, dead)
        last_step = max(record["step"] for record in records(run_dir, "step"))
        assert last_step < TORCHRUN_STEPS, "the run was over before it was hit"
        if signal_name != "SIGKILL":
            assert newest_step(run_dir) == last_step, output[-3000:]
    step, dead = newest_step(run_dir), holder_of(run_dir)
    process = launch(recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_continues(output, run_dir, step, dead)
    assert_bitwise(run_dir, house.root / whole, TORCHRUN_STEPS)
    assert_tidy(run_dir)
