"""Densities of layers, against the paper's section 3.1 written out."""

from __future__ import annotations

import pytest

from leanmill.core.registry import parse_technique
from leanmill.sparse.rigl.density import active_counts, erk_densities
from leanmill.sparse.rigl.rule import Schedule


SHAPES = {"q": (64, 64), "k": (16, 64), "up": (256, 64), "down": (64, 256)}


def test_erdos_renyi_scales_with_fan_in_plus_fan_out():
    densities = erk_densities(SHAPES, 0.1)
    scales = [densities[name] / ((rows + columns) / (rows * columns)) for name, (rows, columns) in SHAPES.items()]
    assert scales == pytest.approx([scales[0]] * 4)
    total = sum(densities[name] * shape[0] * shape[1] for name, shape in SHAPES.items())
    assert total == pytest.approx(0.1 * sum(rows * columns for rows, columns in SHAPES.values()))


def test_layers_that_would_exceed_one_are_dense():
    densities = erk_densities(SHAPES, 0.6)
    # One scale would give k more than 1; it is dense, and the others share the rest by n_in + n_out.
    assert densities["k"] == 1.0
    budget = 0.6 * 37888 - 1024
    scale = budget / (128 + 320 + 320)
    assert densities["q"] == pytest.approx(scale * 128 / 4096)
    assert densities["up"] == densities["down"] == pytest.approx(scale * 320 / 16384)
    nearly = erk_densities(SHAPES, 0.9)
    assert nearly["k"] == nearly["q"] == 1.0
    assert nearly["up"] == pytest.approx((0.9 * 37888 - 1024 - 4096) / (2 * 16384))


def test_experts_are_layers_of_one_density():
    one = erk_densities({"expert": (32, 16), "other": (16, 16)}, 0.3)
    raw = {"expert": 48 / 512, "other": 32 / 256}
    four = erk_densities({"expert": (4, 32, 16), "other": (16, 16)}, 0.3)
    scale = 0.3 * (4 * 512 + 256) / (4 * 48 + 32)
    assert four == pytest.approx({name: scale * value for name, value in raw.items()})
    assert one["expert"] / one["other"] == pytest.approx(four["expert"] / four["other"])


def test_counts():
    assert active_counts(SHAPES, 0.25, "uniform") == {"q": 1024, "k": 256, "up": 4096, "down": 4096}
    for density in (0.013, 0.1, 0.5, 0.77):
        counts = active_counts(SHAPES, density, "erk")
        assert sum(counts.values()) == pytest.approx(density * 37888, abs=len(SHAPES) / 2)
        assert all(0 < counts[name] <= rows * columns for name, (rows, columns) in SHAPES.items())


@pytest.mark.parametrize(
    ("fields", "num_steps", "is_refused"),
    [
        ({"update_every_steps": 100}, 8, True),
        ({"update_every_steps": 6}, 8, True),  # masks rest from step 6 on
        ({"update_every_steps": 5}, 8, False),
        ({"update_every_steps": 100, "drop_fraction": 0.0}, 8, False),
    ],
)
def test_updates_that_never_come_are_refused(fields, num_steps, is_refused):
    problems = list(parse_technique({"type": "rigl", **fields}).problems_in_a_run_of(num_steps))
    assert bool(problems) == is_refused
    schedule = Schedule(
        every_steps=fields["update_every_steps"], drop_fraction=fields.get("drop_fraction", 0.3), until=0.75
    )
    comes = any(schedule.is_due(step, num_steps) for step in range(num_steps))
    assert comes != is_refused or "drop_fraction" in fields
    if problems:
        assert "set it to at most 5, or type drop_fraction: 0" in problems[0]
