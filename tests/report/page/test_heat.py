from __future__ import annotations

import re

import pytest

from leanmill.report.page.heat import RELATIVE, Heat, draw_heat, heat_values, levels, paths, thinned


def heat(cells, **changes) -> Heat:
    fields = {
        "id": "h",
        "title": "<b>title</b>",
        "unit": "unit",
        "cells": cells,
        "rows": [f"r{i}" for i in range(len(cells))],
        "columns": [f"c{i}" for i in range(len(cells[0]))],
        "row_name": "layer",
        "column_name": "expert",
        "colours": RELATIVE,
    }
    return Heat(**{**fields, **changes})


@pytest.mark.parametrize(
    ("load", "index"), [(0, 0), (0.1, 1), (0.25, 2), (0.5, 3), (0.9, 5), (1, 5), (1.12, 5), (1.5, 7), (2, 8), (9, 9)]
)
def test_loads_have_the_colour_of_how_uneven_they_are(load, index):
    assert RELATIVE.index(load) == index


def test_a_factor_up_is_as_far_from_even_as_the_same_factor_down():
    for factor in (1.2, 1.6, 3.0, 5.0):
        assert RELATIVE.index(factor) - 5 == 5 - RELATIVE.index(1 / factor)


def test_every_cell_is_drawn_once_in_its_colour_and_what_is_missing_is_not():
    drawn = paths([[0, 1, None], [1, 8, 1]], RELATIVE)
    found = {name: re.findall(r"M(\d+) (\d+)h", d) for name, d in re.findall(r'class="(r\d)" d="([^"]*)"', drawn)}
    assert found == {"r0": [("0", "0")], "r5": [("1", "0"), ("0", "1"), ("2", "1")], "r9": [("1", "1")]}


def test_levels_span_the_values():
    colours = levels([2.0, 9.0])
    assert [colours.index(value) for value in (2, 2.9, 3.1, 8.9, 9)] == [0, 0, 1, 6, 6]
    assert (colours.low, colours.high) == ("2", "9")
    assert levels([3.0, 3.0]).index(3.0) == 0
    assert levels([]).index(0.5) >= 0


def test_says_where_the_extremes_are_and_escapes():
    page = draw_heat(heat([[1.0, 0.5], [3.25, 1.0]]))
    assert "smallest 0.5 at layer r0, expert c1; largest 3.25 at layer r1, expert c0" in page
    assert "<b>title" not in page
    assert "no values yet" in draw_heat(heat([[None, None]]))


def test_values_for_the_script_are_those_drawn():
    values = heat_values(heat([[1.23456, None]]))
    assert values["cells"] == [[1.23, None]]
    assert values["names"] == ["layer", "expert"]


@pytest.mark.parametrize(("length", "most"), [(3, 5), (5, 5), (100, 7), (6, 5)])
def test_thinning_keeps_both_ends(length, most):
    kept = thinned(length, most)
    assert len(kept) == min(length, most)
    assert (kept[0], kept[-1]) == (0, length - 1)
    assert kept == sorted(set(kept))
