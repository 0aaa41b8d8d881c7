"""Budgets: how many parts each layer keeps. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def shared_out(wanted: Sequence[float], most: Sequence[int], total: int, *, multiple_of: int = 1) -> list[int]:
    """Return whole sizes near those that are wanted, whose sum is the last one that does not exceed `total`.

    Each is at least `multiple_of`, or what there is where that is less. What rounding down leaves goes to the sizes
    that are furthest below what was wanted, of equal ones to the first.

    Args:
        wanted: Size of each layer.
        most: What there is of each.
        total: Of all.
        multiple_of: What sizes are multiples of, but for layers that keep all they have.
    """
    found = []
    for size, there in zip(wanted, most, strict=True):
        whole = int(size // multiple_of) * multiple_of
        found.append(min(there, max(multiple_of, whole)))
    steps = [_steps(there, multiple_of) for there in most]
    while sum(found) > total:
        over = [index for index in range(len(found)) if found[index] > steps[index][0]]
        if not over:
            break
        index = min(over, key=lambda index: (wanted[index] - found[index], -index))
        found[index] = max(step for step in steps[index] if step < found[index])
    while True:
        room = total - sum(found)
        larger = {i: min((step for step in steps[i] if step > found[i]), default=0) for i in range(len(found))}
        under = [i for i, step in larger.items() if 0 < step - found[i] <= room]
        if not under:
            return found
        index = max(under, key=lambda index: wanted[index] - found[index])
        found[index] = larger[index]


def _steps(most: int, multiple_of: int) -> list[int]:
    """Sizes that a layer may have."""
    return [*range(multiple_of, most, multiple_of), most] if most else [0]
