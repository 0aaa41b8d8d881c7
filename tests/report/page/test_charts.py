"""What charts write beside their axes."""

from __future__ import annotations

import pytest

from leanmill.report.page.charts import _distinct


def write(value: float) -> str:
    return f"{value:.3f}"


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([5.0, 5.5, 6.0], ["5.000", "5.500", "6.000"]),
        ([5.29705, 5.2971, 5.29715], ["5.29705", "5.2971", "5.29715"]),
        ([], []),
    ],
)
def test_no_two_ticks_have_one_label(ticks, labels):
    assert _distinct(ticks, write) == labels
