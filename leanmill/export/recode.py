"""Codes of a weight in another encoding, value for value."""

from __future__ import annotations

import dataclasses

import torch

from leanmill.core.facets import Codes
from leanmill.kernels.packing.encoding import Encoding, code_range, number_of


NAMES: dict[Encoding, str] = {1: "binary", 2: "int2", 4: "int4", 8: "int8", "ternary": "ternary"}
"""What `--packing` calls an encoding."""


def recoded(codes: Codes, encoding: Encoding) -> Codes | None:
    """Return `codes` in `encoding`, standing for the same values; None where they do not fit.

    Args:
        codes: Of a weight.
        encoding: The one to have.
    """
    if codes.encoding == encoding:
        return codes
    offset = -1 if codes.encoding == "ternary" else 0
    if encoding == "ternary":
        offset = int(codes.zero)
        if offset != codes.zero:
            return None
    moved = codes.values.to(torch.int16) - offset
    lowest, largest = code_range(number_of(encoding))
    if moved.numel() and not lowest <= int(moved.min()) <= int(moved.max()) <= largest:
        return None
    # Bytes hold every code.
    dtype = torch.int8 if encoding == "ternary" else torch.uint8
    return dataclasses.replace(codes, values=moved.to(dtype), encoding=encoding, zero=codes.zero - offset)


def why_not(name: str, codes: Codes, encoding: Encoding) -> str | None:
    """Return why the weight `name` is not held in `encoding`, and what to type; None where it is."""
    if recoded(codes, encoding) is not None:
        return None
    lowest, largest = code_range(number_of(encoding))
    first, last = (int(codes.values.min()), int(codes.values.max())) if codes.values.numel() else (0, 0)
    middle = f" around {codes.zero:g}" if encoding == "ternary" else ""
    return (
        f"{name} has codes {first} to {last}{middle}, and {NAMES[encoding]} takes {lowest} to {largest}; type "
        f"--packing {_fitting(codes)}, or --to packed, which takes what is smallest for each weight"
    )


def _fitting(codes: Codes) -> str:
    """The smallest encoding that holds `codes`."""
    order: tuple[Encoding, ...] = (1, "ternary", 2, 4, 8)
    return next(NAMES[encoding] for encoding in order if recoded(codes, encoding) is not None)
