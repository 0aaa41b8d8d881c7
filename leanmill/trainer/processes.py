"""The processes of a run: joined before the first one, kept between several, left at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from leanmill.parallel.launch import Ranks, finish, init_processes
from leanmill.parallel.shared_errors import lost_rank
from leanmill.recipe.root import Recipe
from leanmill.trainer.stop import StopSignals


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that a run, or several after one another, is given."""

    ranks: Ranks
    signals: StopSignals


@contextmanager
def processes(recipe: Recipe) -> Iterator[Processes]:
    """Join the processes that a recipe's `device` and `cluster` ask for, and leave them at the end."""
    ranks = init_processes(recipe.device, recipe.cluster)
    signals = StopSignals(limit_seconds=recipe.cluster.interrupt_seconds)
    try:
        yield Processes(ranks=ranks, signals=signals)
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        finish()
        signals.release()
