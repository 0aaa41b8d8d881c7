"""Evolution of levels under a budget: pure bookkeeping, no model."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence

from leanmill.core.levels import Judge, Space, State


log = logging.getLogger(__name__)

_MOST_SWITCHES = 3
_MOST_CHANGES = 10
"""Of units in one offspring where sizes differ, as in the authors' code."""
_LEAST_SPENT = 0.8
"""Of what was freed, where sizes differ: offspring that waste their budget are no use. As in the authors' code."""
_ATTEMPTS = 50
"""Mutations tried for each offspring wanted; a small space runs out of new ones."""


class Evolution:
    """See `EvoPress`.

    Args:
        generations: How many.
        offspring: Of each.
        stages: (survivors, tokens) of each stage of selection.
        exchanges_any: Whether a switch may go between units of different sizes.
        num_starts: Random candidates for the first parent.
        start_tokens: What those are judged on.
        seed: Of all that is drawn; each generation draws by a hash of it and its number, so that one that was cut off
            is repeated as it was.
    """

    def __init__(
        self,
        *,
        generations: int,
        offspring: int,
        stages: Sequence[tuple[int, int]],
        exchanges_any: bool,
        num_starts: int,
        start_tokens: int,
        seed: int,
    ) -> None:
        self.generations, self.offspring, self.stages = generations, offspring, stages
        self.exchanges_any, self.num_starts, self.start_tokens, self.seed = (
            exchanges_any,
            num_starts,
            start_tokens,
            seed,
        )

    def run(self, space: Space, judge: Judge) -> State:
        kept = judge.recall() or {"parents": [], "losses": []}
        # A search that went on for longer than is asked for now has passed what is asked for.
        parents: list[State] = [tuple(parent) for parent in kept["parents"][: self.generations]]
        losses: list[float] = kept["losses"][: self.generations]
        if parents:
            log.info("the search goes on after generation %d", len(parents))
        parent = parents[-1] if parents else self._first(space, judge)
        for generation in range(len(parents), self.generations):
            parent, loss = self._next(parent, space, judge, generation)
            parents.append(parent)
            losses.append(loss)
            log.info("generation %d of %d: loss %.5f", generation + 1, self.generations, loss)
            judge.remember({"parents": [list(one) for one in parents], "losses": losses})
        return parent

    def _first(self, space: Space, judge: Judge) -> State:
        draw = random.Random(f"{self.seed} start")
        found = list(dict.fromkeys(random_start(space, draw) for _ in range(self.num_starts)))
        if len(found) == 1:
            return found[0]
        return _best(found, judge, num_tokens=self.start_tokens, draw=f"{self.seed} start", survivors=1)[0][0]

    def _next(self, parent: State, space: Space, judge: Judge, generation: int) -> tuple[State, float]:
        """Return the next parent and its loss in the last stage."""
        draw = random.Random(f"{self.seed} {generation}")
        candidates = self._offspring(parent, space, draw)
        found: list[tuple[State, float]] = []
        for stage, (survivors, num_tokens) in enumerate(self.stages):
            if stage == len(self.stages) - 1:
                candidates = [*candidates, parent]
            if candidates:
                rows = f"{self.seed} {generation} {stage}"
                found = _best(candidates, judge, num_tokens=num_tokens, draw=rows, survivors=survivors)
                candidates = [state for state, _ in found]
        return found[0]

    def _offspring(self, parent: State, space: Space, draw: random.Random) -> list[State]:
        mutate = mutate_any if self.exchanges_any else mutate_same_size
        found: dict[State, None] = {}
        for _ in range(_ATTEMPTS * self.offspring):
            child = mutate(parent, space, draw)
            if child is not None and child != parent:
                found[child] = None
            if len(found) == self.offspring:
                break
        return list(found)


def _best(
    candidates: Sequence[State], judge: Judge, *, num_tokens: int, draw: str, survivors: int
) -> list[tuple[State, float]]:
    """The `survivors` of least loss, the earlier first where two lose alike; what loses no number comes last."""
    losses = judge.losses(candidates, num_tokens=num_tokens, draw=draw)
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    order = sorted(range(len(candidates)), key=lambda index: (known[index], index))
    return [(candidates[index], known[index]) for index in order[:survivors]]


def random_start(space: Space, draw: random.Random) -> State:
    """Return levels within the budget: the smallest that meets it everywhere, some units taken down from there."""
    num_units = len(space.costs)
    level = next(level for level in range(space.num_levels) if space.cost([level] * num_units) >= space.budget)
    state = [level] * num_units
    cost = space.cost(state)
    while cost > space.budget:
        unit = draw.choice([index for index in range(num_units) if state[index] > 0])
        cost -= _step_down(space, state, unit)
    return tuple(state)


def mutate_same_size(parent: State, space: Space, draw: random.Random) -> State | None:
    """Return a state that costs the same: units of one size go a level up and down in pairs; None if none can."""
    state = list(parent)
    for _ in range(_num_switches(draw)):
        ups = [unit for unit in _raisable(space, state) if _partners(space, state, unit)]
        if not ups:
            return None
        up = draw.choice(ups)
        down = draw.choice(_partners(space, state, up))
        state[up] += 1
        state[down] -= 1
    return tuple(state)


def mutate_any(parent: State, space: Space, draw: random.Random) -> State | None:
    """Return a state within the budget, of units of any size; None where that fails.

    Units go up first, then others go down as long as the budget is exceeded.
    """
    state, cost = list(parent), space.cost(parent)
    added = removed = 0
    raised: set[int] = set()
    num_up = _num_switches(draw)
    for _ in range(num_up):
        if not (ups := _raisable(space, state)):
            break
        unit = draw.choice(ups)
        raised.add(unit)
        state[unit] += 1
        added += space.costs[unit][state[unit]] - space.costs[unit][state[unit] - 1]
    num_changes = num_up
    while cost + added - removed > space.budget:
        downs = [unit for unit, level in enumerate(state) if level > 0 and unit not in raised]
        num_changes += 1
        if not downs or num_changes > _MOST_CHANGES:
            return None
        removed += _step_down(space, state, draw.choice(downs))
    return tuple(state) if added >= _LEAST_SPENT * removed else None


def _num_switches(draw: random.Random) -> int:
    return min(draw.randint(1, _MOST_SWITCHES), draw.randint(1, _MOST_SWITCHES))


def _raisable(space: Space, state: Sequence[int]) -> list[int]:
    return [unit for unit, level in enumerate(state) if level + 1 < space.num_levels]


def _partners(space: Space, state: Sequence[int], up: int) -> list[int]:
    """Units that can go down by as much as `up` goes up."""
    costs = space.costs[up]
    gain = costs[state[up] + 1] - costs[state[up]]
    return [
        unit
        for unit, level in enumerate(state)
        if unit != up and level > 0 and space.costs[unit][level] - space.costs[unit][level - 1] == gain
    ]


def _step_down(space: Space, state: list[int], unit: int) -> int:
    """Take a unit a level down and return what that frees."""
    state[unit] -= 1
    return space.costs[unit][state[unit] + 1] - space.costs[unit][state[unit]]
