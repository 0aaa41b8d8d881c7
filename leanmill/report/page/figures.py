"""Which charts a report has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leanmill.report.page.charts import Chart, Series, with_smoothing
from leanmill.report.page.data import Record, RunData, keys, points
from leanmill.report.units import count, number, percent, scientific


_NUM_COLOURS = 6
"""Of lines, in page.css."""


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: Sequence[Chart]


def groups(run: RunData) -> list[Group]:
    """Every group of charts of a run."""
    events = [("resume", step) for step in run.resumed_at] + [("skip", step) for step in run.skipped_at]
    rules = _metrics(run.steps, "rule", "at the step logged")
    probes = _metrics(run.evals, "probe", "held-out text")
    return [
        Group("Learning", [_training_loss(run, events), _validation_loss(run), _bits_per_byte(run)]),
        Group("Optimisation", [_learning_rate(run), _gradient_norm(run, events)]),
        Group("Speed and memory", _speed(run, events)),
        *([Group("Step rules", rules)] if rules else []),
        *([Group("Probes of held-out text", probes)] if probes else []),
    ]


def domains(run: RunData) -> list[str]:
    """Domains of all evaluations; `all` comes last and only where it says more than the one domain."""
    found = [name for name in keys(run.evals, "domains") if name != "all"]
    return [*found, "all"] if len(found) != 1 else found


def _training_loss(run: RunData, events: Sequence[tuple[str, int]]) -> Chart:
    # Of losses that a model has in several places (`name/place`), their mean.
    names = [name for name in keys(run.steps, "losses") if "/" not in name]
    if set(names) == {"total", "cross_entropy"} and all(
        record["losses"].get("total") == record["losses"].get("cross_entropy") for record in run.steps
    ):
        names = ["cross_entropy"]
    series = [
        part
        for color, name in enumerate(names)
        for part in with_smoothing(
            Series(label=name.replace("_", " "), points=points(run.steps, "losses", name), color=color + 1)
        )
    ]
    smoothed = any(part.faint for part in series)
    return Chart(
        id="loss", title="Training loss", unit="nats per token", series=series, format=number, events=events,
        note="Strong line: moving average, exponential to both sides. Light line: as logged." if smoothed else "",
    )  # fmt: skip


def _validation_loss(run: RunData) -> Chart:
    series = [
        Series(label=name, points=points(run.evals, "domains", name, "loss"), color=_color(index, name))
        for index, name in enumerate(domains(run))
    ]
    return Chart(id="val", title="Validation loss", unit="nats per token", series=series, format=number)


def _bits_per_byte(run: RunData) -> Chart:
    scores, baselines = [], []
    levels: list[str] = []
    for index, name in enumerate(domains(run)):
        color = _color(index, name)
        scores.append(Series(label=name, points=points(run.evals, "domains", name, "bits_per_byte"), color=color))
        order0 = points(run.evals, "domains", name, "order0_bits_per_byte")
        # A constant of the text, so it spans the chart even where there is only one evaluation.
        line = [(0.0, order0[-1][1]), (_last_step(run), order0[-1][1])] if order0 else []
        baselines.append(Series(label=name, points=line, color=color, dashed=True, in_legend=False))
        levels.extend(f"{name} {value:.2f}" for _, value in order0[-1:])
    note = f"Dashed: order-0, the entropy of single bytes in the same text ({', '.join(levels)})." if levels else ""
    return Chart(
        id="bpb", title="Bits per byte", unit="held-out text", series=[*baselines, *scores], format=number,
        from_zero=True, note=note,
    )  # fmt: skip


def _learning_rate(run: RunData) -> Chart:
    series = [Series(label="learning rate", points=points(run.steps, "lr"), color=1)]
    return Chart(
        id="lr", title="Learning rate", unit="first parameter group", series=series, format=scientific,
        style="scientific", from_zero=True,
    )  # fmt: skip


def _gradient_norm(run: RunData, events: Sequence[tuple[str, int]]) -> Chart:
    series = with_smoothing(Series(label="gradient norm", points=points(run.steps, "grad_norm"), color=2))
    return Chart(
        id="grad", title="Gradient norm", unit="global, before clipping", series=series, format=number,
        allow_log=True, events=events,
    )  # fmt: skip


def _speed(run: RunData, events: Sequence[tuple[str, int]]) -> list[Chart]:
    memory = [(step, value / 2**30) for step, value in points(run.steps, "peak_memory_bytes")]
    charts = [
        Chart(
            id="speed", title="Throughput", unit="tokens/s, all ranks", format=count, style="count",
            series=[Series(label="all ranks", points=points(run.steps, "tokens_per_second"), color=3)],
            from_zero=True, events=events,
        ),
        Chart(
            id="time", title="Step time", unit="seconds", format=number, from_zero=True, events=events,
            series=[Series(label="seconds a step", points=points(run.steps, "step_seconds"), color=4)],
        ),
        Chart(
            id="memory", title="Peak memory", unit="GiB, worst rank", format=number, from_zero=True,
            series=[Series(label="worst rank", points=memory, color=5)], events=events,
        ),
    ]  # fmt: skip
    utilisation = points(run.steps, "mfu")
    if utilisation:
        charts.insert(1, Chart(
            id="mfu", title="MFU", unit="of peak FLOP/s", format=percent, style="percent", from_zero=True,
            series=[Series(label="utilisation", points=utilisation, color=1)], events=events,
        ))  # fmt: skip
    return charts


def _metrics(records: Sequence[Record], kind: str, unit: str) -> list[Chart]:
    """One chart a metric that step rules or probes report, but those of one layer: see `layers_view.py`."""
    names = [name for name in keys(records, "metrics") if name.count("/") == 1]
    found = [(name, points(records, "metrics", name)) for name in names]
    return [
        Chart(
            id=f"{kind}-{index}", title=name.replace("/", ": ").replace("_", " "), unit=unit, format=number,
            series=[Series(label=name, points=values, color=index % _NUM_COLOURS + 1)],
            # A count that stays 0 has no axis below it.
            from_zero=not any(value for _, value in values),
        )
        for index, (name, values) in enumerate(found)
    ]  # fmt: skip


def _last_step(run: RunData) -> float:
    return float(max(record["step"] for record in [*run.steps, *run.evals]))


def _color(index: int, name: str) -> int:
    return 0 if name == "all" else index + 1
