import math
import random

import pytest

from leanmill.core.errors import RunError
from leanmill.core.least_error import least_error
from leanmill.core.levels import Space
from leanmill.core.registry import parse_pass
from leanmill.search.layer_budgets.program import Program
from tests.search.judges import FormulaJudge, states_within


def total(state, errors):
    return sum(of_unit[level] for of_unit, level in zip(errors, state, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_least_sum_of_all_states_within_the_budget(seed):
    draw = random.Random(seed)
    costs = tuple(tuple(sorted(draw.sample(range(40), 3))) for _ in range(6))
    errors = [[draw.random() for _ in range(3)] for _ in range(6)]
    floor = sum(of_unit[0] for of_unit in costs)
    space = Space(costs, draw.randint(floor, floor + 60))
    found = least_error(space, errors, technique="layer_budgets")
    assert space.cost(found) <= space.budget
    assert total(found, errors) == pytest.approx(min(total(state, errors) for state in states_within(space)))


def test_large_costs_are_rounded_up_so_that_the_budget_holds(monkeypatch):
    monkeypatch.setattr("leanmill.core.least_error._BUCKETS", 50)
    draw = random.Random(0)
    costs = tuple((0, draw.randrange(10**9), 10**9 + draw.randrange(10**9)) for _ in range(6))
    errors = [[3 + draw.random(), 1 + draw.random(), 0.0] for _ in range(6)]
    space = Space(costs, 4 * 10**9)
    found = least_error(space, errors, technique="layer_budgets")
    assert space.cost(found) <= space.budget
    best = min(total(state, errors) for state in states_within(space))
    assert total(found, errors) <= best + 1.5


def test_errors_that_are_no_number_are_never_taken():
    space = Space(((1, 2), (1, 2)), 3)
    assert least_error(space, [[math.nan, 0.5], [0.1, 0.0]], technique="layer_budgets") == (1, 0)
    with pytest.raises(RunError, match="no levels"):
        least_error(space, [[math.nan, 0.5], [math.inf, 0.0]], technique="layer_budgets")
    with pytest.raises(RunError, match="no levels"):
        least_error(Space(((2, 3), (2, 3)), 3), [[0.0, 0.0]] * 2, technique="layer_budgets")


def test_errors_at_the_output_are_of_one_unit_alone():
    space = Space(((1, 2, 3),) * 3, 6)
    weights = (1.0, 5.0, 2.0)
    judge = FormulaJudge(
        lambda state: sum(w * (2 - level) for w, level in zip(weights, state, strict=True) if level is not None)
    )
    found = Program(num_tokens=64, seed=3).run(space, judge)
    ((candidates, num_tokens, draw),) = judge.asked
    assert (num_tokens, draw) == (64, "3 budgets")
    assert candidates[:4] == [[0, None, None], [1, None, None], [2, None, None], [None, 0, None]]
    errors = [[w * (2 - level) for level in range(3)] for w in weights]
    assert total(found, errors) == min(total(state, errors) for state in states_within(space))


def test_tokens_of_errors_that_take_none_are_refused():
    levels = ["dense", {"type": "wanda", "sparsity": 0.5}]
    with pytest.raises(ValueError, match="tokens is for error: output"):
        parse_pass({"type": "layer_budgets", "levels": levels, "sparsity": 0.3, "error": "layer", "tokens": 64})
