"""What an encoding is: how many codes a byte holds and which values they take."""

from __future__ import annotations

from typing import Literal

import torch


Encoding = Literal[1, 2, 4, 8, "ternary"]
ENCODINGS = (1, 2, 4, 8, "ternary")
TERNARY = 3
"""The number that stands for base-3 in kernels and operator schemas; the others are their bits."""


def number_of(encoding: Encoding) -> int:
    """Return the number kernels know an encoding by.

    Raises:
        ValueError: Not an encoding.
    """
    if encoding not in ENCODINGS or isinstance(encoding, bool):
        raise ValueError(f"encoding {encoding!r} is unknown; allowed: 1, 2, 4, 8 (bits a code) and 'ternary'")
    return TERNARY if encoding == "ternary" else int(encoding)


def codes_per_byte(number: int) -> int:
    """Return how many codes share a byte."""
    return 5 if number == TERNARY else 8 // number


def packed_length(num_codes: int, number: int) -> int:
    """Return the bytes that a row of `num_codes` takes."""
    return -(-num_codes // codes_per_byte(number))


def code_range(number: int) -> tuple[int, int]:
    """Return the least and the largest code."""
    return (-1, 1) if number == TERNARY else (0, (1 << number) - 1)


def code_dtype(number: int) -> torch.dtype:
    """Return the dtype of unpacked codes."""
    return torch.int8 if number == TERNARY else torch.uint8
