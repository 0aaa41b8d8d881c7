"""What of a checkpoint is each worker's own, where groups of ranks train without each other (`layout.low_comm`).

`model` and `optimizer` hold what any run can go on with: the model of all, and the first worker's optimizer. Beside
them lie `outer`, equal on all workers, and `workers`, where every name begins with a worker's number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from leanmill.checkpoint.components import take_apart
from leanmill.checkpoint.group import SaveGroup
from leanmill.checkpoint.loading import read_part
from leanmill.checkpoint.reading import read_index


OUTER, WORKERS = "outer", "workers"
_OPTIMIZER = "optimizer/"


class Stateful(Protocol):
    """What is saved: an engine, or who stands for one; see `leanmill.parallel.engine.Engine`."""

    def model_state(self) -> dict[str, Tensor]:
        """Return the model."""

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Write it."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state."""

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Write it."""


@runtime_checkable
class WorkersState(Stateful, Protocol):
    """What is saved where workers have something of their own."""

    worker: int
    """Which one this process is of."""

    def outer_state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return what is equal on all workers, beside the model: what is there now, or room for `names` of it."""

    def load_outer_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take what `outer_state` returned, once that of a checkpoint after `step` steps was read into it."""

    def worker_state(self) -> dict[str, Tensor]:
        """Return what is this worker's own, live: `model/...` and `optimizer/...`."""

    def load_worker_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `worker_state` returned, once a checkpoint was read into it."""


def named(state: Mapping[str, Tensor], worker: int) -> dict[str, Tensor]:
    """Return a worker's state by the names that it has in a checkpoint; the first's optimizer is the checkpoint's."""
    own = {name: value for name, value in state.items() if worker or not name.startswith(_OPTIMIZER)}
    return take_apart({f"{worker}/{name}": value for name, value in own.items()})


def load_workers(folder: Path, source: WorkersState, group: SaveGroup, step: int) -> None:
    """Give a worker what it had in a checkpoint, after its model and optimizer; collective.

    Of W saved workers, worker w goes on from w mod W: fewer ranks leave some out, more begin as copies. In a checkpoint
    of a run without workers there is nothing more, and all begin alike.

    Raises:
        ConfigError: Other parameters train.
        RunError: A file is damaged.
    """
    if not (folder / WORKERS).is_dir():
        return
    outer = source.outer_state(read_index(folder / OUTER))
    read_part(folder / OUTER, outer, group, only=outer.__contains__)
    source.load_outer_state(outer, step)
    saved = read_index(folder / WORKERS)
    worker = source.worker % (1 + max(int(name.partition("/")[0]) for name in saved))
    live = source.worker_state()
    read_part(folder / WORKERS, named(live, worker), group, only=lambda name: name.startswith(f"{worker}/"))
    source.load_worker_state(live)
