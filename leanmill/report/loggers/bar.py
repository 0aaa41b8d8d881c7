"""The live bar of a run on a terminal; rich is imported here alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text


FIELDS = ("epoch", "loss", "speed", "mfu", "eta")


class Bar(progress.Progress):
    """Steps done, what moves beside them, and below it the terms of the loss.

    Args:
        name: Of the run.
        num_steps: Its length.
        start_step: Where it goes on from.
        stream: The terminal.
    """

    def __init__(self, name: str, num_steps: int, start_step: int, stream: TextIO) -> None:
        self._terms = ""  # before the base class, which draws once
        columns = [
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            *(progress.TextColumn("{task.fields[" + field + "]}") for field in FIELDS),
        ]
        super().__init__(*columns, console=Console(file=stream), expand=True)
        empty: dict[str, Any] = dict.fromkeys(FIELDS, "")
        self._task = self.add_task(name.replace("[", r"\["), total=num_steps, completed=start_step, **empty)

    def show(self, step: int, fields: dict[str, str], terms: str) -> None:
        """Move the bar to a step; `terms` is the line below it, empty for none."""
        self._terms = terms
        shown: dict[str, Any] = {field: fields[field] for field in FIELDS}
        self.update(self._task, completed=step, **shown)

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        yield from super().get_renderables()
        if self._terms:
            yield Text(f"  {self._terms}", overflow="ellipsis", no_wrap=True)
