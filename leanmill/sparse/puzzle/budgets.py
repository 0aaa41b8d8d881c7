"""What each pair of attention and MLP takes of the budgets, and the choice within them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.paths import expand_user
from leanmill.core.program import cheapest_choices
from leanmill.sparse.puzzle.alternatives import Half, Pair, PartName


Latencies = Mapping[tuple[PartName, str], float]
"""Microseconds of a forward of an attention or MLP with its norm, by `Half.name`."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One bound on all layers together."""

    name: str
    taken: list[float]
    """By each pair."""
    most: float


def choose(scores: NDArray[np.float64], pairs: Sequence[Pair], budgets: Sequence[Budget]) -> list[Pair]:
    """Return a pair for each layer: scores add up to the least within the budgets, and some layer has attention.

    Args:
        scores: [layers, pairs]; what is no number is never taken.
        pairs: To choose from.
        budgets: See there.

    Raises:
        RunError: Nothing is within the budgets.
    """
    number = len(scores)
    costs = np.where(np.isfinite(scores), scores, np.inf)
    costs = costs - np.minimum.reduce(costs, axis=1, keepdims=True)  # none is negative; the choice is the same
    bad = ~np.isfinite(costs)
    every = [(np.tile(one.taken, (number, 1)), 0.0, one.most) for one in budgets]
    has_attention = np.tile([float(pair.attention.size > 0) for pair in pairs], (number, 1))
    every.append((has_attention, 1.0, float(number)))
    every.append((bad.astype(np.float64), 0.0, 0.0))
    chosen = cheapest_choices(np.where(bad, 0.0, costs), every)
    if chosen is None:
        least = ", ".join(f"{one.name} {number * min(one.taken):,.0f} of at most {one.most:,.0f}" for one in budgets)
        raise RunError(
            f"puzzle: no choice keeps to the budgets; the smallest alternatives take {least}; give larger budgets, or "
            f"smaller alternatives"
        )
    return [pairs[index] for index in chosen]


def read_table(path: str, wanted: Sequence[tuple[PartName, Half]]) -> dict[tuple[PartName, str], float]:
    """Read a table that `write_table` wrote.

    Raises:
        ConfigError: It is none, or lacks what is wanted.
    """
    try:
        found = json.loads(Path(expand_user(path)).read_text(encoding="utf-8"))
        table = {(part, half.name): float(found[part][half.name]) for part, half in wanted if half.name != "none"}
    except KeyError as error:
        raise ConfigError(
            f"puzzle.latency_table {path} has no latency of {error}; remove the file to have it measured here"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"puzzle.latency_table {path} is no table ({error!r}); it holds microseconds, as in "
            f'{{"attention": {{"8": 120.0, "linear": 9.0}}, "mlp": {{"1024": 90.0}}}}; remove the file to have it '
            f"measured here"
        ) from error
    if bad := [key for key, us in table.items() if not 0 <= us < math.inf]:
        raise ConfigError(f"puzzle.latency_table {path}: no latency of {bad[0]} is {table[bad[0]]}")
    return table


def write_table(path: str, latencies: Latencies) -> None:
    """Write latencies as JSON; ranks may do so at once, as they agree on them."""
    document: dict[str, object] = {"unit": "microseconds"}
    for part in ("attention", "mlp"):
        document[part] = {name: us for (of, name), us in latencies.items() if of == part}
    target = Path(expand_user(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(target)
