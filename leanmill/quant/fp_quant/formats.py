"""Formats by name. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names


_MOST_EXPONENT_BITS, _MOST_MANTISSA_BITS = 8, 10


@dataclass(frozen=True)
class FloatFormat:
    """Elements of a sign, exponent bits and mantissa bits, and who shares which kind of scale."""

    exponent_bits: int
    mantissa_bits: int
    largest: float
    block_size: int | None = None
    """Neighbours of a row that share a scale; None leaves that to `granularity`."""
    block_scale: Literal["power_of_two", "two_level"] | None = None
    """`power_of_two`: an exponent of 8 bits (MX). `two_level`: E4M3 times one fp32 a matrix (NVFP4)."""

    @property
    def is_unscaled(self) -> bool:
        """Whether it has the range of fp32, so that nothing needs a scale."""
        return self.exponent_bits == _MOST_EXPONENT_BITS


def plain_format(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """Return the format of so many bits, whose top codes are numbers like any others; E4M3 and E5M2: OCP's."""
    if (exponent_bits, mantissa_bits) == (4, 3):  # one mantissa of the top exponent is NaN
        return FloatFormat(4, 3, 448.0)
    if (exponent_bits, mantissa_bits) == (5, 2) or exponent_bits == 8:  # the top exponent is infinity and NaN
        top = 2 ** (exponent_bits - 1) - 1
    elif exponent_bits <= 1:
        return FloatFormat(
            exponent_bits, mantissa_bits, (2.0 ** (mantissa_bits + exponent_bits) - 1) * 2.0 ** (1 - mantissa_bits)
        )
    else:
        top = 2 ** (exponent_bits - 1)
    return FloatFormat(exponent_bits, mantissa_bits, 2.0**top * (2.0 - 2.0**-mantissa_bits))


def _block(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    return FloatFormat(
        exponent_bits, mantissa_bits, plain_format(exponent_bits, mantissa_bits).largest, 32, "power_of_two"
    )


BLOCK_FORMATS: dict[str, FloatFormat] = {
    "mxfp4": _block(2, 1),
    "mxfp6_e2m3": _block(2, 3),
    "mxfp6_e3m2": _block(3, 2),
    "mxfp8_e4m3": _block(4, 3),
    "mxfp8_e5m2": _block(5, 2),
    "mxint4": _block(0, 3),
    "mxint8": _block(0, 7),
    "nvfp4": FloatFormat(2, 1, 6.0, 16, "two_level"),
}
"""OCP Microscaling 1.0 (mxint4 is its MXINT8 with fewer bits) and NVIDIA's NVFP4."""
SEARCHED: dict[str, tuple[str, ...]] = {
    "fp4": ("e1m2", "e2m1", "e3m0"),
    "fp6": ("e2m3", "e3m2", "e4m1"),
    "fp8": ("e2m5", "e3m4", "e4m3", "e5m2"),
}
"""Divisions of so many bits."""


def candidates_of(name: str) -> tuple[str, ...]:
    """Return the formats to choose from; none where `name` is a format itself."""
    return SEARCHED.get(name, ())


def format_of(name: str) -> FloatFormat:
    """Return the format of a name: one of `BLOCK_FORMATS`, or e<exponent bits>m<mantissa bits>.

    Raises:
        ConfigError: There is none.
    """
    if name in BLOCK_FORMATS:
        return BLOCK_FORMATS[name]
    found = re.fullmatch(r"e(\d)m(\d\d?)", name)
    if found is None:
        known = (*BLOCK_FORMATS, *SEARCHED)
        near = near_names(name, known, count=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
        raise ConfigError(f"unknown floating-point format {name!r}; {hint} Others are written e2m1, e3m2 and so on")
    exponent_bits, mantissa_bits = int(found[1]), int(found[2])
    if exponent_bits > _MOST_EXPONENT_BITS or mantissa_bits > _MOST_MANTISSA_BITS or exponent_bits + mantissa_bits < 2:
        raise ConfigError(
            f"{name!r} is no format here: exponents have 0 to {_MOST_EXPONENT_BITS} bits, mantissas 0 to "
            f"{_MOST_MANTISSA_BITS}, and both together at least 2; type e.g. e2m1"
        )
    return plain_format(exponent_bits, mantissa_bits)
