"""What options of the command line take. Imports argparse alone."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable


def _whole(text: str, most_digits: int, fits: Callable[[int], bool], what: str) -> int:
    if re.fullmatch(f"[0-9]{{1,{most_digits}}}", text) and fits(int(text)):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no {what}")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")  # which fits nothing
    if fits(value):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no {what}")


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 9, lambda value: value >= 1, "whole number from 1 to 999999999")


def seed(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 18, lambda value: True, "seed; give a whole number from 0")


def port(text: str) -> int:
    """A number of a TCP port, 0 for any."""
    return _whole(text, 5, lambda value: value < 65_536, "port; give a number from 0 to 65535")


def temperature(text: str) -> float:
    """A number from 0 for sampling."""
    return _number(text, lambda value: 0 <= value < 1e3, "temperature; give a number from 0, e.g. 0.8")


def gib(text: str) -> float:
    """A size in GiB above 0."""
    return _number(text, lambda value: 0 < value < 1e9, "size in GiB; give a number above 0, e.g. 80")


def above_zero(text: str) -> float:
    """A number above 0."""
    return _number(text, lambda value: 0 < value < 1e15, "number above 0")


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, lambda value: 0 <= value <= 1, "share; give a number from 0 to 1, e.g. 0.02")
