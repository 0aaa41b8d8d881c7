"""How many weights of each layer are active. Plain arithmetic; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal


def active_counts(
    shapes: Mapping[str, tuple[int, ...]], density: float, distribution: Literal["erk", "uniform"]
) -> dict[str, int]:
    """Return how many weights of each layer are active, `density` of all weights together.

    Args:
        shapes: Name -> [..., out, in]. Stacked experts are as many layers of one density, counted as one.
        density: Share of all weights that is active.
        distribution: `uniform` gives each layer this density, `erk` see `erk_densities`.
    """
    densities = dict.fromkeys(shapes, density) if distribution == "uniform" else erk_densities(shapes, density)
    return {name: round(densities[name] * math.prod(shape)) for name, shape in shapes.items()}


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Return densities proportional to (out + in) / (out in), Erdos-Renyi graphs (Evci et al. 2020, section 3.1).

    Where that is more than 1, the layer is dense, and the others share what is left; as in the
    authors' code, one layer (or several equal ones) after another.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: (shape[-2] + shape[-1]) / (shape[-2] * shape[-1]) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(raw[name] * sizes[name] for name in rest)
        steepest = max(raw[name] for name in rest)
        if scale * steepest <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name in rest if raw[name] == steepest}
    return dict.fromkeys(shapes, 1.0)
