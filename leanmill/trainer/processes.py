"""The processes of a run: joined before the first one, kept between several, left at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from leanmill.parallel.launch import Ranks, finish, init_processes
from leanmill.parallel.pulse import Pulse, PulseWatch
from leanmill.parallel.shared_errors import lost_rank
from leanmill.recipe.root import Recipe
from leanmill.trainer.stop import StopSignals


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that a run, or several after one another, is given."""

    ranks: Ranks
    signals: StopSignals
    pulse: Pulse = field(default_factory=Pulse)
    """What this process is doing, for ranks that wait for it."""


@contextmanager
def processes(recipe: Recipe, *, pulse: Pulse | None = None) -> Iterator[Processes]:
    """Join the processes that a recipe's `device` and `cluster` ask for, and leave them at the end.

    Args:
        recipe: The recipe.
        pulse: Where this process says what it is doing; None makes one.
    """
    ranks = init_processes(recipe.device, recipe.cluster)
    signals = StopSignals(limit_seconds=recipe.cluster.interrupt_seconds)
    given = Processes(ranks=ranks, signals=signals, pulse=pulse or Pulse())
    watch = _watch(recipe, given)
    try:
        yield given
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        if watch is not None:
            watch.end()
        finish()
        given.signals.release()


def _watch(recipe: Recipe, given: Processes) -> PulseWatch | None:
    """Watch for ranks that do not come, where there are others."""
    seconds, ranks = recipe.cluster.hang_seconds, given.ranks
    if seconds is None or ranks.world_size == 1:
        return None
    watch = PulseWatch(
        given.pulse,
        dist.distributed_c10d._get_default_store(),
        rank=ranks.rank,
        world_size=ranks.world_size,
        hang_seconds=seconds,
        folder=recipe.run_folder / "hang",
        then=f"; the run ends once a collective has waited for {recipe.cluster.step_timeout_seconds} s",
    )
    return watch.start()
