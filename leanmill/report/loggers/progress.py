"""What a person sees while a run goes on: a bar on a terminal, narrow lines with their time elsewhere."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from leanmill.core.redact import redact
from leanmill.report.loggers.facts import device_peak, run_facts, utilisation
from leanmill.report.observer import DomainScore, EvalRecord, Observer, RunInfo, StepRecord
from leanmill.report.units import count, duration, plural


if TYPE_CHECKING:
    from leanmill.report.loggers.bar import Bar

WIDTH = 80
"""Columns of a line, without the time in front of it in a file."""
REPORT_NAME = "report.html"


class Progress(Observer):
    """Prints to stderr: start banner, one line a record or a live bar, evaluations, the report's path.

    Args:
        run_dir: Where the report will be.
        stream: Where to print; stderr unless a test gives another.
    """

    def __init__(self, run_dir: Path, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._report = run_dir / REPORT_NAME
        self._bar: Bar | None = None
        self._info: RunInfo | None = None
        self._peak: float | None = None
        self._started = time.monotonic()

    def on_start(self, info: RunInfo) -> None:
        self._info, self._peak, self._started = info, device_peak(info), time.monotonic()
        for text in banner(info):
            self._print_wrapped(text)
        if self._stream.isatty():
            from leanmill.report.loggers.bar import Bar

            self._bar = Bar(redact(info.recipe.name), info.num_steps, info.start_step, self._stream)
            self._bar.start()

    def on_step(self, record: StepRecord) -> None:
        assert self._info is not None, "on_start comes first"
        share = utilisation(self._info, self._peak, record.tokens_per_second)
        if self._bar is None:
            for line in step_lines(record, self._info.num_steps, share):
                self._print(line)
            return
        fields = step_fields(record, self._info.num_steps, share)
        self._bar.show(record.step, fields, "  ".join(loss_terms(record)))

    def on_eval(self, record: EvalRecord) -> None:
        for line in eval_lines(record):
            self._print(line)
        for note in record.notes:
            self._print_wrapped(f"  {note}")
        for sample in record.samples:
            self._print_wrapped(f"  > {_one_line(sample.prompt)} … {_one_line(sample.text)}")

    def on_end(self, status: str, message: str = "") -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._info is None:
            return
        self._print(f"{status} after {duration(time.monotonic() - self._started)}")
        if message:
            self._print_wrapped(message)
        if self._report.exists():
            self._print(f"report: {self._report.resolve()}")

    def _print_wrapped(self, text: str) -> None:
        self._print(*_wrap(text))

    def _print(self, *lines: str) -> None:
        """Print one line, or one with its continuations, which have no time of their own."""
        shown = [redact(line) for line in lines]
        if self._bar is not None:
            for line in shown:
                self._bar.print_line(line)
            return
        if not self._stream.isatty():  # lines that may be read days later
            stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
            shown = [f"{' ' * len(stamp) if number else stamp}{line}" for number, line in enumerate(shown)]
        print("\n".join(shown), file=self._stream, flush=True)  # noqa: T201 (this observer is where a run prints)


def banner(info: RunInfo) -> list[str]:
    """Texts shown before the first step."""
    facts = run_facts(info)
    techniques = " + ".join(facts["techniques"]) or "no techniques"
    parameters = count(info.num_parameters)
    if info.num_trainable != info.num_parameters:
        parameters += f" ({count(info.num_trainable)} trainable)"
    ranks = plural(info.world_size, "rank")
    start = f" from step {info.start_step:,}" if info.start_step else ""
    passes = f", {info.epochs:.3g} passes over the data" if info.epochs is not None else ""
    return [
        f"{facts['name']}: {facts['model']}, {parameters} parameters, {techniques}",
        f"{facts['engine']} on {ranks} of {facts['hardware']['device']}, {facts['precision']}",
        f"{plural(info.num_steps, 'step')} of {facts['tokens_per_step']:,} tokens{passes}{start}, "
        f"{info.flops_per_token:.3g} FLOPs a token",
        *info.notes,
    ]


def _one_line(text: str) -> str:
    """Text of a model as a part of a line: what a terminal would obey is shown instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(redact(text), WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def step_fields(record: StepRecord, num_steps: int, share: float | None) -> dict[str, str]:
    """The moving parts of the bar and of a line: loss, epoch, speed, MFU, ETA."""
    remaining = (num_steps - record.step) * record.step_seconds
    return {
        "loss": f"loss {record.losses.get('total', float('nan')):.3f}",
        "epoch": "" if record.epoch is None else f"epoch {record.epoch:.2f}",
        "speed": f"{count(record.tokens_per_second)} tok/s",
        "mfu": "" if share is None else f"mfu {share:.0%}",
        "eta": f"eta {duration(remaining)}",
    }


def loss_terms(record: StepRecord) -> list[str]:
    """What the loss is made of, where that is more than one thing: `cross_entropy 2.113`.

    Of a loss inside the model that has several places, its mean.
    """
    terms = {name: value for name, value in record.losses.items() if name != "total" and "/" not in name}
    return [f"{name} {value:.3f}" for name, value in terms.items()] if len(terms) > 1 else []


def step_lines(record: StepRecord, num_steps: int, share: float | None) -> list[str]:
    """One record as a line, and below it the terms of its loss, of at most WIDTH columns."""
    terms = textwrap.wrap(
        "  ".join(term.replace(" ", "\xa0") for term in loss_terms(record)),
        WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
    )
    return [step_line(record, num_steps, share), *(line.replace("\xa0", " ") for line in terms)]


def step_line(record: StepRecord, num_steps: int, share: float | None) -> str:
    """One record as a line of at most WIDTH columns."""
    fields = step_fields(record, num_steps, share)
    width = len(str(num_steps))
    parts = [
        f"step {record.step:>{width}}/{num_steps}",
        fields["epoch"],
        fields["loss"],
        f"norm {record.grad_norm:.2g}",
        f"lr {record.lr:.1e}",
        fields["speed"],
        fields["mfu"],
        fields["eta"],
        f"skipped {record.skipped_steps}" if record.skipped_steps else "",
    ]
    line = "  ".join(part for part in parts if part)
    # The least needed part goes first where a line would wrap.
    for droppable in (f"lr {record.lr:.1e}", f"norm {record.grad_norm:.2g}", fields["epoch"], fields["mfu"]):
        if droppable and len(line) > WIDTH:
            line = line.replace(f"  {droppable}", "", 1)
    return line


def _of_text(score: DomainScore) -> str:
    """What is said of predicted text beside the loss."""
    if score.perplexity is None:
        return f"  {score.num_tokens:,} pairs"
    bits, order0 = score.bits_per_byte, score.order0_bits_per_byte
    return f"  ppl {score.perplexity:.4g}  bits/byte {bits:.3f} (order-0 {order0:.2f})"


def eval_lines(record: EvalRecord) -> list[str]:
    """An evaluation, one line a domain and one a mean that probes report."""
    if not record.domains:
        return []
    width = max(len(name) for name in record.domains)
    scores = [f"  {name:<{width}}  loss {score.loss:.3f}{_of_text(score)}" for name, score in record.domains.items()]
    means = [f"  {name} {value:.3f}" for name, value in record.metrics.items() if name.count("/") == 1]
    return [f"evaluation at step {record.step:,}", *scores, *means]
