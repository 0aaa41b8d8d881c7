"""When the loop stops, saves and evaluates, and which step it names. No model: an engine that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import RunError
from leanmill.core.rules import StepContext, StepRule
from leanmill.recipe.root import Recipe
from leanmill.report.observer import Observer, StepRecord
from leanmill.trainer import loop as loop_module
from leanmill.trainer.loop import Loop
from leanmill.trainer.rewind import RewindError
from leanmill.trainer.stop import Agreement, Stop
from tests.distributed import run_ranks


class IdleEngine:
    """Takes no step; the gradient norm of the steps in `bad` is NaN."""

    device, data_rank, data_size, views, module = torch.device("cpu"), 0, 1, None, torch.nn.Identity()

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad, self.steps = bad, 0
        self.skips: list[bool] = []
        self.param_groups = [{"lr": 1.0, "initial_lr": 1.0, "weight_decay": 0.1, "initial_weight_decay": 0.1}]

    def forward_backward(self, micro_batches: Any, num_valid: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        return {"total": torch.ones(())}

    def clip(self, max_norm: float | None) -> Tensor:
        return torch.tensor(float("nan") if self.steps in self.bad else 1.0)

    def step(self, skip: Tensor) -> None:
        self.skips.append(bool(skip))


@pytest.fixture(autouse=True)
def asked_about(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Batches that were looked at for where they stop being finite; there is no model to look at."""
    asked: list[Any] = []

    def source_of(engine: Any, micro_batches: Any, num_valid: Tensor) -> str:
        asked.append(micro_batches)
        return "somewhere"

    monkeypatch.setattr(loop_module, "source_of", source_of)
    return asked


class Rows:
    position_tokens = 0

    def next_rows(self, num_rows: int, *, rank: int, world_size: int) -> dict[str, Tensor]:
        self.position_tokens += 64 * num_rows
        return {"labels": torch.full((num_rows, 64), self.position_tokens // 64)}


class Run:
    """A loop of 10 steps; a signal comes during `moment`, such as "step 3" or "save 4"."""

    def __init__(
        self, moment: str = "", *, bad: tuple[int, ...] = (), level: Stop = Stop.STOPPED, rules: Any = (), **train: Any
    ) -> None:
        self.events: list[str] = []
        self.moment, self.level, self.asked = moment, level, Stop.NOT_ASKED
        recipe = Recipe(
            model={"config": {"model_type": "llama"}},
            data={"sequence_length": 64},
            batch={"tokens_per_step": 64, "tokens_per_micro_batch": 64},
            train={"steps": 10, **train},
            eval={"every_steps": 5},
            checkpoint={"every_steps": 4},
        )
        run, engine = self, IdleEngine(bad)

        class Watched(Loop):
            def train_step(self) -> None:
                super().train_step()
                run.happens(f"step {self.step + 1}")

        self.loop = Watched(
            recipe=recipe,
            engine=engine,
            data=Rows(),
            step_rules=rules,
            observers=(),
            num_steps=10,
            num_micro_batches=1,
            save=lambda step: self.happens(f"save {step}"),
            evaluate=lambda step: self.happens(f"eval {step}"),
        )

    def happens(self, event: str) -> None:
        self.events.append(event)
        if event == self.moment:
            self.asked = self.level

    def go(self) -> Stop:
        return self.loop.run(lambda: self.asked)


def _steps(first: int, last: int) -> list[str]:
    return [f"step {step}" for step in range(first, last + 1)]


def test_a_run_without_signals_goes_to_the_end() -> None:
    run = Run()
    assert run.go() is Stop.NOT_ASKED
    assert run.events == [*_steps(1, 4), "save 4", "step 5", "eval 5", *_steps(6, 8), "save 8", *_steps(9, 10)] + [
        "eval 10",
        "save 10",
    ]


@pytest.mark.parametrize(
    ("moment", "tail"),
    [
        ("step 3", ["step 3", "save 3"]),
        ("step 5", ["step 5", "save 5"]),  # an evaluation is due, and nobody waits for it
        ("eval 5", ["eval 5", "save 5"]),
        ("save 4", ["step 4", "save 4"]),
        ("step 10", ["step 10", "save 10"]),
    ],
)
@pytest.mark.parametrize("level", [Stop.STOPPED, Stop.INTERRUPTED])
def test_after_a_signal_no_step_is_begun(moment: str, tail: list[str], level: Stop) -> None:
    run = Run(moment, level=level)
    assert run.go() is level
    assert run.events[-2:] == tail
    assert run.loop.step == int(moment.split()[1])


@pytest.mark.parametrize("moment", ["eval 10", "save 10"])
def test_a_run_that_is_done_has_finished(moment: str) -> None:
    assert Run(moment).go() is Stop.NOT_ASKED


class Third(StepRule):
    """Takes the optimizer's place in every third step."""

    name = "third"

    def __init__(self) -> None:
        self.skipped: list[bool] = []

    def replaces_optimizer(self, context: StepContext) -> bool:
        return context.step % 3 == 2

    def after_optimizer(self, context: StepContext) -> None:
        assert context.skipped is not None
        self.skipped.append(bool(context.skipped))

    def metrics(self) -> dict[str, float]:
        return {"calls": float(len(self.skipped))}


def test_rules_replace_steps_and_know_which_were_skipped() -> None:
    records: list[Any] = []

    class Records(Observer):
        def on_step(self, record: StepRecord) -> None:
            records.append(record)

    rule = Third()
    run = Run(rules=[rule], bad=(2, 6), non_finite="skip")
    run.loop.observers = [Records()]
    run.go()
    assert run.loop.engine.skips == [step in (2, 3, 6, 9) for step in range(1, 11)]  # type: ignore[attr-defined]
    assert rule.skipped == [step in (2, 6) for step in range(1, 11)]
    assert run.loop.num_skipped == 2, "a replaced step is not a skipped one"
    assert records[-1].metrics == {"third/calls": 10.0}


class Halved(BatchRule):
    """Takes out the labels of the second half of every row."""

    name = "halved"

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin_step(self, context: StepContext) -> None:
        self.events.append(f"begin {context.step}")

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        self.events.append(f"change {context.step}")
        keeps = torch.arange(64) < 32
        return [{**batch, "labels": torch.where(keeps, batch["labels"], -100)} for batch in batches]


def test_batch_rules_come_after_schedules_and_before_targets_are_counted() -> None:
    rule = Halved()
    run = Run(rules=[rule])
    counted: list[float] = []
    train = run.loop.engine.forward_backward

    def forward_backward(micro_batches: Sequence[Batch], num_valid: Tensor) -> dict[str, Tensor]:
        counted.append(float(num_valid))
        assert sum(int((batch["labels"] != -100).sum()) for batch in micro_batches) == num_valid
        return train(micro_batches, num_valid)

    run.loop.engine.forward_backward = forward_backward  # type: ignore[method-assign]
    run.go()
    assert counted == [32.0] * 10
    assert rule.events == [f"{what} {step}" for step in range(10) for what in ("begin", "change")]


def test_a_signal_to_one_rank_stops_all_in_the_same_step() -> None:
    def body() -> list[str]:
        run = Run("step 3" if dist.get_rank() == 1 else "")
        assert run.go() is Stop.STOPPED
        return run.events

    assert run_ranks(body, 2) == [[*_steps(1, 3), "save 3"]] * 2


def test_a_host_that_runs_ahead_stops_one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA."""
    monkeypatch.setattr(loop_module, "agreement_for", lambda device, outer: Agreement(deferred=True))

    def body() -> list[str]:
        run = Run("step 2" if dist.get_rank() == 1 else "")
        run.go()
        return run.events

    assert run_ranks(body, 2) == [[*_steps(1, 3), "save 3"]] * 2


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("bad", [(4,), (4, 6), (10,), (1,)])
def test_the_step_named_is_the_one_that_was_not_finite(
    at_once: bool, bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, asked_about: list[Any]
) -> None:
    """On CUDA the flag is read when a record is due, here after 10 steps."""
    monkeypatch.setattr(Loop, "_reads_at_once", property(lambda self: at_once))
    run = Run(bad=bad)
    with pytest.raises(RunError, match=rf"gradient in step {bad[0]}: somewhere;"):
        run.go()
    # Its own batch, whose labels are the number of the step here, and no other.
    assert [int(batch["labels"][0, 0]) for (batch,) in asked_about] == [bad[0]]
    assert run.loop.engine.steps == (bad[0] if at_once else 10)


def test_batches_are_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch, asked_about: list[Any]) -> None:
    monkeypatch.setattr(Loop, "_reads_at_once", property(lambda self: False))
    monkeypatch.setattr(loop_module, "MAX_RECENT_BYTES", 3 * 64 * 8)
    with pytest.raises(RunError, match=r"gradient in step 9: somewhere;"):
        Run(bad=(9,)).go()
    with pytest.raises(RunError, match=r"gradient in step 4; its update"):
        Run(bad=(4,)).go()
    assert len(asked_about) == 1


def test_steps_before_the_last_record_are_not_named() -> None:
    run = Run(bad=(4, 12), non_finite="skip")
    run.go()
    assert run.loop.num_skipped == 1
    assert run.loop._troubles.read() is None


@pytest.mark.parametrize("at_once", [True, False])
def test_a_rewind_says_where_the_data_goes_on(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "_reads_at_once", property(lambda self: at_once))
    run = Run(bad=(4,), non_finite="rewind")
    with pytest.raises(RewindError, match="non-finite loss or gradient in step 4: somewhere") as caught:
        run.go()
    assert caught.value.step == 4
    # All that was read by the time it is known.
    assert caught.value.position_rows == (4 if at_once else 10)


@pytest.mark.parametrize("action", ["skip", "stop", "rewind"])
def test_a_spike_is_kept_back(action: str, asked_about: list[Any]) -> None:
    run = Run(non_finite="skip", spike={"action": action, "window_steps": 4, "sigmas": 3})
    clip = run.loop.engine.clip
    # Between ups and downs one that is tall, and one that is no number.
    norms = {6: 50.0, 9: float("nan")}
    run.loop.engine.clip = lambda limit: clip(limit) * norms.get(steps := run.loop.engine.steps, 1 + steps % 2 / 10)  # type: ignore
    if action == "skip":
        run.go()
        assert run.loop.engine.skips == [step in (6, 9) for step in range(1, 11)]  # type: ignore[attr-defined]
    else:
        kind = RewindError if action == "rewind" else RunError
        with pytest.raises(kind, match="spike of the loss or the gradient's norm in step 6"):
            run.go()
        assert run.loop.engine.skips == [step == 6 for step in range(1, 7)]  # type: ignore[attr-defined]
    assert not asked_about


class Workers:
    """Workers that meet every three steps, and tell when all ranks are asked for something."""

    config = SimpleNamespace(patience_seconds=1)
    layout = SimpleNamespace(inside=None)
    overlaps = False

    def __init__(self, run: Run) -> None:
        self.run = run

    def meets(self, step: int) -> bool:
        return step % 3 == 0

    def after_step(self, step: int, *, is_last: bool) -> None:
        if self.meets(step) or is_last:
            self.run.happens(f"outer {step}")

    def begin_max(self, level: Tensor) -> Any:
        self.run.happens("asked")
        return lambda: level

    def meet(self) -> None:
        self.run.happens("met")

    def metrics(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    ("moment", "tail"),
    [
        ("step 1", [*_steps(1, 3), "outer 3", "asked", "met", "save 3", "asked"]),
        # A checkpoint makes all ranks meet as well.
        ("step 7", ["outer 6", "asked", *_steps(7, 8), "met", "save 8", "asked"]),
    ],
)
def test_workers_agree_on_a_stop_where_they_meet(moment: str, tail: list[str]) -> None:
    run = Run(moment)
    run.loop.outer = Workers(run)  # type: ignore[assignment]
    assert run.go() is Stop.STOPPED
    assert run.events[-len(tail) :] == tail
