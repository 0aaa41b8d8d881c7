import math

import pytest

from leanmill.evaluate.scores import Score, beyond, by_group, differences


def score(value, *, low=False, group="a", items=None, count=4):
    return Score(task="t", group=group, metric="m", value=value, count=count, lower_is_better=low, items=items)


@pytest.mark.parametrize(
    ("value", "dense", "low", "loss"),
    [
        (0.70, 0.75, False, 0.05),
        (0.80, 0.75, False, -0.05),
        (2.2, 2.0, True, 0.1),
        (1.8, 2.0, True, -0.1),
        (math.nan, 2.0, True, math.inf),
        (math.inf, 2.0, True, math.inf),
        (math.nan, 0.5, False, math.inf),
        (2.0, math.nan, True, -math.inf),
    ],
)
def test_accuracy_falls_by_points_and_bits_rise_by_share(value, dense, low, loss):
    assert differences([score(value, low=low)], [score(dense, low=low)])[0].loss == pytest.approx(loss)


def test_the_bound_is_held_against_every_group():
    dense = [score(0.9, group="a"), score(0.9, group="b"), score(2.0, low=True, group="c")]
    found = differences([score(0.9, group="a"), score(0.85, group="b"), score(math.nan, low=True, group="c")], dense)
    assert [one.score.group for one in beyond(found, 0.04)] == ["b", "c"]
    assert [one.score.group for one in beyond(found, 0.06)] == ["c"]


def test_changed_answers_show_where_means_are_equal():
    dense = score(0.5, items=(True, True, False, False))
    (one,) = differences([score(0.5, items=(True, False, True, False))], [dense])
    assert (one.loss, one.changed) == (0, 0.5)
    assert one.standard_error == pytest.approx(math.sqrt(0.5 / 4))
    (same,) = differences([dense], [dense])
    assert (same.changed, same.standard_error) == (0, 0)


def test_groups_and_all():
    found = by_group("t", ["x", "y", "x"], [True, False, False])
    assert [(s.group, s.value, s.count) for s in found] == [("x", 0.5, 2), ("y", 0.0, 1), ("all", 1 / 3, 3)]
    assert [s.group for s in by_group("t", ["x"], [True])] == ["x"]
