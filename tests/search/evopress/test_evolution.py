import math
import random

import pytest

from leanmill.core.levels import Space
from leanmill.search.evopress.evolution import Evolution, mutate_any, mutate_same_size, random_start
from tests.search.judges import FormulaJudge, states_within


SPACE = Space(costs=((2, 3, 4),) * 7, budget=21)
MIXED = Space(costs=((20, 30, 40),) * 4 + ((8, 12, 16),) * 3, budget=156)


def loss(state):
    """Errors that do not add up: neighbours that are both small hurt more than each alone."""
    weights = (5.0, 1.0, 0.5, 3.0, 0.2, 2.0, 0.7)
    alone = sum(weight * (2 - level) ** 2 for weight, level in zip(weights, state, strict=True))
    return alone + sum(4.0 for left, right in zip(state, state[1:], strict=False) if left + right == 0)


def evolution(**changes):
    options = {"generations": 25, "offspring": 16, "stages": [(4, 100), (2, 200), (1, 400)]}
    options |= {"exchanges_any": False, "num_starts": 4, "start_tokens": 100, "seed": 0} | changes
    return Evolution(**options)


@pytest.mark.parametrize("space", [SPACE, MIXED])
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_all_states_is_found(space, seed):
    best = min(map(loss, states_within(space)))
    found = evolution(seed=seed, exchanges_any=space is MIXED, generations=60).run(space, FormulaJudge(loss))
    assert space.cost(found) <= space.budget
    assert loss(found) == pytest.approx(best)


def test_switches_cost_nothing_and_have_two_ends():
    draw = random.Random(0)
    state = random_start(SPACE, draw)
    assert state == (1,) * 7
    changed = set()
    for _ in range(300):
        child = mutate_same_size(state, SPACE, draw)
        assert SPACE.cost(child) == 21
        changed.add(sum(abs(a - b) for a, b in zip(child, state, strict=True)))
    assert changed == {0, 2, 4, 6}  # one to three switches; two may undo each other
    mixed = random_start(MIXED, draw)
    for _ in range(300):
        child = mutate_same_size(mixed, MIXED, draw)
        assert MIXED.cost(child) == MIXED.cost(mixed)
        for part in (slice(0, 4), slice(4, 7)):
            assert sum(child[part]) == sum(mixed[part])


def test_units_of_any_size_stay_within_the_budget_and_spend_it():
    draw = random.Random(0)
    sizes = set()
    for _ in range(200):
        state = random_start(MIXED, draw)
        assert 156 - 10 < MIXED.cost(state) <= 156
        child = mutate_any(state, MIXED, draw)
        if child is not None:
            assert MIXED.cost(child) <= 156
            sizes.add(MIXED.cost(child) - MIXED.cost(state))
    assert len(sizes) > 2


def test_all_candidates_of_a_stage_see_the_same_text_and_the_parent_joins_the_last():
    judge = FormulaJudge(loss)
    evolution(generations=2).run(SPACE, judge)
    assert [(tokens, draw) for _, tokens, draw in judge.asked] == [
        (tokens, f"0 {generation} {stage}") for generation in (0, 1) for stage, tokens in enumerate((100, 200, 400))
    ]
    first, second, third = (candidates for candidates, *_ in judge.asked[:3])
    assert len(first) == len(set(first)) == 16
    assert (1,) * 7 not in first
    assert second == sorted(first, key=loss)[:4]
    assert third == [*sorted(first, key=loss)[:2], (1,) * 7]


def test_the_parent_stays_until_a_better_one_comes():
    judge = FormulaJudge(loss)
    evolution(generations=12).run(SPACE, judge)
    losses = judge.memory["losses"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_search_that_was_cut_off_ends_as_one_that_was_not():
    whole = evolution(generations=9).run(SPACE, FormulaJudge(loss))
    judge = FormulaJudge(loss, ends_after=4)
    with pytest.raises(KeyboardInterrupt):
        evolution(generations=9).run(SPACE, judge)
    again = FormulaJudge(loss)
    again.memory = judge.memory
    assert evolution(generations=9).run(SPACE, again) == whole
    assert len(again.asked) == 3 * 5
    assert evolution(generations=12).run(SPACE, again) == evolution(generations=12).run(SPACE, FormulaJudge(loss))
    assert len(again.asked) == 3 * 8
    shorter = FormulaJudge(loss)
    shorter.memory = again.memory
    assert evolution(generations=4).run(SPACE, shorter) == evolution(generations=4).run(SPACE, FormulaJudge(loss))
    assert not shorter.asked


def test_what_is_no_number_never_wins():
    def broken(state):
        return math.nan if state[0] != 1 else loss(state)

    assert evolution().run(SPACE, FormulaJudge(broken))[0] == 1


def test_a_space_without_a_second_state_ends():
    space = Space(costs=((1, 2),), budget=1)
    assert evolution(generations=3).run(space, FormulaJudge(lambda state: 0.0)) == (0,)
    two = Space(costs=((1, 2), (1, 2)), budget=3)
    assert evolution(generations=3).run(two, FormulaJudge(lambda state: float(state[0]))) == (0, 1)
