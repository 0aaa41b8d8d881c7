"""Lengths given in steps, or as a share of the run. Imports no torch."""

from __future__ import annotations


def steps_of(given: int | float, num_steps: int, *, at_least: int = 0) -> int:
    """Return how many steps are meant: `given` itself (int), or the share of the run that it is (float), rounded.

    Args:
        given: Steps, or a share.
        num_steps: Of the run.
        at_least: Least that a share above 0 comes to.
    """
    if isinstance(given, int):
        return given
    return max(at_least, round(given * num_steps)) if given > 0 else 0
