"""What options of the command line take. Imports argparse alone."""

from __future__ import annotations

import argparse
import re


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 999999999")
    return value


def temperature(text: str) -> float:
    """A number from 0 for sampling."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e3:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature; give a number from 0, e.g. 0.8")
    return value


def seed(text: str) -> int:
    """A whole number from 0."""
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0")
    return value


def gib(text: str) -> float:
    """A size in GiB above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GiB; give a number above 0, e.g. 80")
    return value


def port(text: str) -> int:
    """A number of a TCP port, 0 for any."""
    value = int(text) if re.fullmatch("[0-9]{1,5}", text) else -1
    if not 0 <= value < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number from 0 to 1, e.g. 0.02")
    return value
