"""Runs that end themselves at a chosen moment, forked from a process that has everything imported.

A start of `leanmill train` costs seconds of imports, a fork none: dozens of kills fit in a test.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import leanmill.checkpoint.storage as storage
import leanmill.trainer.run as trainer
from leanmill.checkpoint.finding import newest_sound
from leanmill.checkpoint.reading import read_full_state
from leanmill.checkpoint.snapshot import Snapshot, Snapshots
from leanmill.cli.main import main
from leanmill.parallel.torch_engine import TorchEngine
from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.trainer.run_lock import RunLock


POINTS: dict[str, tuple[Any, str]] = {
    "batch": (trainer.Loop, "_next_batch"),
    "backward": (torch.Tensor, "backward"),
    "clip": (TorchEngine, "clip"),
    "update": (TorchEngine, "step"),
    "record": (JsonlLog, "_write"),
    "snapshot": (Snapshots, "take"),
    "copies": (Snapshot, "finish_host_copies"),
    "tensors": (storage, "_write_all"),
    "verify": (trainer.CheckpointManager, "find"),
    "load": (storage.SafetensorsReader, "read_data"),
    "evaluate": (trainer, "evaluate"),
    "text": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "unlink": (os, "unlink"),
    "link": (os, "link"),
    "displace": (RunLock, "_move_aside"),
    "mkdir": (os, "mkdir"),
}
"""What a run comes past, by name: an attribute that it calls, on whichever thread."""


def _half_a_text(path: Path, text: str, *_: Any, **__: Any) -> None:
    path.open("w", encoding="utf-8").write(text[: len(text) // 2])


def _half_a_tensor(file: Any, data: memoryview, _: Any) -> None:
    file.write(data[: len(data) // 2])


def _half_a_record(log: JsonlLog, kind: str, _: Any) -> None:
    log._file.write(f'{{"kind": "{kind}", "ti')
    log._file.flush()


_HALVES: dict[str, Callable[..., None]] = {
    "text": _half_a_text,
    "tensors": _half_a_tensor,
    "record": _half_a_record,
}


@dataclass(frozen=True)
class Moment:
    """When a process gets a signal: as it comes past a point for the `count`-th time."""

    point: str
    count: int
    when: str = "before"
    """`before` the call, `after` it, or `half` way through what it writes."""
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        name = signal.Signals(self.signal).name
        return f"{name} {self.when} {self.point} {self.count}"

    def arm(self) -> None:
        """Have this process get the signal at that moment."""
        counter, lock = Counter[str](), threading.Lock()

        def come_past(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with lock:
                counter["calls"] += 1
                is_it = counter["calls"] == self.count
            if is_it and self.when != "after":
                if self.when == "half":
                    _HALVES[self.point](*args, **kwargs)
                os.kill(os.getpid(), self.signal)
            result = call(*args, **kwargs)
            if is_it and self.when == "after":
                os.kill(os.getpid(), self.signal)
            return result

        _wrap(self.point, come_past)


def count_points(counts: Path) -> None:
    """Have this process write to `counts`, as it ends, how often it came past each point."""
    counter, real_exit = Counter[str](), os._exit
    for point in POINTS:

        def come_past(call: Callable[..., Any], *args: Any, _point: str = point, **kwargs: Any) -> Any:
            counter[_point] += 1
            return call(*args, **kwargs)

        _wrap(point, come_past)

    def leave(code: int) -> None:
        with counts.open("w", encoding="utf-8") as file:
            json.dump(counter, file)
        real_exit(code)

    os._exit = leave  # type: ignore[assignment]


def _wrap(point: str, come_past: Callable[..., Any]) -> None:
    owner, name = POINTS[point]
    call = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # Of renames those of checkpoints count.
        if point == "rename" and "step-" not in str(args[0]):
            return call(*args, **kwargs)
        return come_past(call, *args, **kwargs)

    setattr(owner, name, wrapped)


@dataclass
class Child:
    """A forked run."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout_seconds: float = 240) -> int:
        """Return its exit code, or minus the signal that ended it."""
        while (found := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() - self.started > timeout_seconds:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"hung: {self.output[-4000:]}")
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(found[1])

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def fork(command: Callable[[], int], log: Path, *, prepare: Callable[[], None] = lambda: None) -> Child:
    """Run `command` in a fork of this process, which has imported all it needs."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.write_text("", encoding="utf-8")
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 99
    try:
        output = log.open("w", buffering=1, encoding="utf-8")
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        logging.getLogger().handlers.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        prepare()
        code = command()
    finally:
        sys.stdout.flush()
        os._exit(code)


def fork_train(recipe: Path, log: Path, *overrides: str, prepare: Callable[[], None] = lambda: None) -> Child:
    """`leanmill train` in a fork."""
    return fork(lambda: main(["train", str(recipe), *overrides]), log, prepare=prepare)


def fork_ranks(
    recipe: Path, log: Path, num_ranks: int, *overrides: str, moments: dict[int, Moment] | None = None
) -> list[Child]:
    """The ranks of a run, as torchrun would start them, one fork each; `moments` by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def prepare(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        if moments and rank in moments:
            moments[rank].arm()

    return [
        fork_train(recipe, log.with_suffix(f".{rank}.log"), *overrides, prepare=lambda rank=rank: prepare(rank))
        for rank in range(num_ranks)
    ]


def records(run_dir: Path, kind: str) -> Iterator[dict[str, Any]]:
    """What metrics.jsonl says, also of steps that were done twice."""
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.endswith("}") and json.loads(line)["kind"] == kind:
            yield json.loads(line)


def assert_bitwise(run_dir: Path, whole: Path, steps: int) -> None:
    """Assert that a run ended as an uninterrupted one: weights, optimizer, losses of every step, scores."""
    last = f"checkpoints/step-{steps:08d}"
    for part in ("model", "optimizer"):
        expected, got = (read_full_state(folder / last, part) for folder in (whole, run_dir))
        assert expected.keys() == got.keys()
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    losses = {record["step"]: record["losses"] for record in records(whole, "step")}
    assert set(losses) == set(range(1, steps + 1))
    seen = [(record["step"], record["losses"]) for record in records(run_dir, "step")]
    # A step that was done again has the same loss again.
    assert [(step, loss) for step, loss in seen if loss != losses[step]] == []
    assert {step for step, _ in seen} == set(losses)
    scores = {record["step"]: record["domains"] for record in records(whole, "eval")}
    assert all(record["domains"] == scores[record["step"]] for record in records(run_dir, "eval"))
    states = [json.loads((folder / last / "train_state.json").read_text()) for folder in (whole, run_dir)]
    assert states[0] == states[1]


def assert_tidy(run_dir: Path) -> None:
    """Assert that nothing that could be taken for something is left of earlier runs."""
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert [name for name in names if not (name.startswith("step-") and name[5:].isdigit())] == []
    assert not (run_dir / "run.lock").exists()


@dataclass
class Counted:
    """What a sweep came to."""

    kills: Counter[str] = field(default_factory=Counter)
    bitwise: int = 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return f"{self.kills.total()} kills in {self.bitwise} runs, all bitwise: {kinds}"


def newest_step(run_dir: Path) -> int | None:
    """The step that a resume must continue from, by the files alone."""
    path = newest_sound(run_dir / "checkpoints").path
    if path is None:
        return None
    assert path.name[5:].removesuffix(".old").isdigit(), path
    return int(path.name[5:13])


def holder_of(run_dir: Path) -> int | None:
    """The process that the run folder's lock names."""
    path = run_dir / "run.lock"
    return json.loads(path.read_text())["pid"] if path.exists() else None


def assert_continues(output: str, run_dir: Path, step: int | None, dead: int | None) -> None:
    """Assert what a run says that was started over the rests of another, if it came as far as its first lines."""
    told = " ".join(output.split())
    if "left plain:" not in told:
        return
    if dead is not None:
        assert f"taking over run_dir={run_dir} from process {dead}" in told
    assert ("resumed" in told) == (step is not None)
    if step is not None:
        assert f"at step {step}" in told


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder and its recipe (`target`.yaml), which then names the copy; return the recipe."""
    shutil.copytree(source, target)
    text = source.with_suffix(".yaml").read_text(encoding="utf-8").replace(f"run_dir: {source}", f"run_dir: {target}")
    target.with_suffix(".yaml").write_text(text, encoding="utf-8")
    return target.with_suffix(".yaml")
