"""Names, state and metrics of step rules."""

from __future__ import annotations

import pytest

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepRule, check_trained, load_state, metrics_of, state_of


class Counting(StepRule):
    def __init__(self, name, value):
        self.name, self.value = name, value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

    def metrics(self):
        return {"value": float(self.value)}


def _rules(*values):
    return [Counting("count", values[0]), StepRule(), Counting("count", values[1])]


def test_rules_of_one_name_are_numbered():
    assert state_of(_rules(3, 5)) == {"count": {"value": 3}, "count_2": {"value": 5}}
    assert metrics_of(_rules(3, 5)) == {"count/value": 3.0, "count_2/value": 5.0}


def test_state_comes_back():
    rules = _rules(0, 0)
    load_state(rules, state_of(_rules(3, 5)))
    assert state_of(rules) == state_of(_rules(3, 5))


def test_a_rule_that_was_added_starts_anew():
    rules = _rules(7, 8)
    load_state(rules, {"count": {"value": 3}})
    assert [rule.value for rule in rules if isinstance(rule, Counting)] == [3, 8]


def test_state_of_a_rule_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="state of the rule 'count_2', which this run has not; add the technique"):
        load_state(_rules(0, 0)[:2], state_of(_rules(3, 5)))


def test_a_frozen_weight_cannot_be_moved():
    check_trained("rigl", "q_proj", True)
    with pytest.raises(ConfigError, match="rigl moves q_proj, but another technique freezes it"):
        check_trained("rigl", "q_proj", False)
