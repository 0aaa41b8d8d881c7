"""What a stage tells of the weight it makes, for exports, products and engines that hold a part of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from leanmill.kernels.fake_quant.grid import Kind
from leanmill.kernels.packing.encoding import Encoding


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A delta scaling x B A on a weight [..., out, in]."""

    a: Tensor
    """[..., rank, in]."""
    b: Tensor
    """[..., out, rank]."""
    scaling: float


@dataclass(frozen=True, kw_only=True)
class StoredFactors:
    """A delta of low rank that lies on disk."""

    rank: int
    read: Callable[[], LowRank]
    """Returns it, fp32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class LearnedGrid:
    """Steps that a stage rounds to with LSQ's gradients, as `leanmill.kernels.fake_quant` has it."""

    scale: Tensor
    """Shaped as that operation takes it."""
    num_bits: int
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A staged weight [..., out, in] as integers: (values - zero) * scales."""

    values: Tensor
    """uint8 codes 0 .. 2^bits - 1, or int8 codes -1, 0, 1 of a ternary weight; of the weight's shape."""
    encoding: Encoding
    """How `leanmill.kernels.packing` stores them."""
    scales: Tensor
    """fp32 [..., out, groups], each of in / groups neighbours; [..., out, 1] of rows; one element of all."""
    zero: float
    """The code, or the middle between two, that stands for zero."""


@dataclass(frozen=True, kw_only=True)
class FloatCodes:
    """A staged weight [..., out, in] as small floats: what their codes stand for, times `scales`, times `outer`."""

    values: Tensor
    """uint8 codes of the weight's shape: sign, exponent, mantissa, from the top; see `kernels.packing.elements`."""
    exponent_bits: int
    mantissa_bits: int
    scales: Tensor
    """Shaped as those of `Codes`: float8_e8m0fnu where they are powers of two, float8_e4m3fn, or fp32."""
    outer: Tensor | None = None
    """fp32 [..., 1, 1]: of a whole matrix; None is 1."""

    @property
    def num_bits(self) -> int:
        """Of a code: 4, 6 or 8."""
        return 1 + self.exponent_bits + self.mantissa_bits


@dataclass(frozen=True)
class Statistic:
    """What a stage that holds a part of a weight asks of the whole: its own share, to be combined with the others'."""

    value: Tensor
    """Any floating shape and dtype, the same for every part. Sums of many are in fp64, so that their order does not
    show."""
    over_parts: Literal["sum", "max"] = "sum"


PartStaging = Generator[Statistic, Tensor, Tensor]
"""Staging of a part of a weight: yields statistics, is sent those of the whole, returns the staged part."""


class Packing(Protocol):
    """A form in which a staged weight takes fewer bytes and loses nothing."""

    def pack(self, part: Tensor) -> tuple[Tensor, ...]:
        """Pack neighbours along the weight's first dim, [n, ...] with n >= 1, into tensors of any dtype."""
        ...

    def unpack(self, packed: Sequence[Tensor]) -> Tensor:
        """Return the parts in a row, given each tensor of `pack`, those of all parts in a row along their first dim."""
        ...
