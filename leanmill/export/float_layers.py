"""Layers for evaluation that hold their weight as codes of small floats, on disk and in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.facets import FloatCodes
from leanmill.export.stored_layer import CodedRows, CodedTable
from leanmill.kernels.packed_matmul.held import HeldRows
from leanmill.kernels.packing.elements import element_levels, pack_elements, unpack_elements


SCALES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}
"""How scales are stored, by the name that the folder's list has."""
FORMS = {
    ("e2m1", "e8m0", 32): "mxfp4",
    ("e2m3", "e8m0", 32): "mxfp6_e2m3",
    ("e3m2", "e8m0", 32): "mxfp6_e3m2",
    ("e4m3", "e8m0", 32): "mxfp8_e4m3",
    ("e5m2", "e8m0", 32): "mxfp8_e5m2",
    ("e2m1", "e4m3", 16): "nvfp4",
}
"""Names of formats, by element, scales and neighbours that share one."""
_MOST = 127
"""Steps from zero that 8-bit codes say."""


class FloatRows(CodedRows):
    """A weight [out, in] as codes of small floats, scales of groups, and perhaps one of the whole.

    Args:
        packed: uint8 [out, bytes], what `pack_elements` returns.
        scales: uint8 [out, groups], the bytes of a `scale_format` of 8 bits, or fp32.
        in_features: Codes of a row.
        exponent_bits: Of an element.
        mantissa_bits: Of an element.
        scale_format: One of `SCALES`.
        outer: The scale of the whole, a number of fp32.
    """

    def __init__(
        self, packed: Tensor, scales: Tensor, *,
        in_features: int, exponent_bits: int, mantissa_bits: int, scale_format: str, outer: float,
    ) -> None:  # fmt: skip
        super().__init__(packed, scales, in_features=in_features)
        self.exponent_bits, self.mantissa_bits = exponent_bits, mantissa_bits
        self.scale_format, self.outer = scale_format, outer

    @property
    def num_bits(self) -> int:
        """Of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def levels(self) -> Tensor:
        """What codes stand for, fp32 [2^bits]."""
        return element_levels(self.exponent_bits, self.mantissa_bits).to(self.packed.device)

    def scale_values(self, scales: Tensor) -> Tensor:
        """Return stored scales as numbers, fp32, that of the whole included."""
        return scales.view(SCALES[self.scale_format]).float() * self.outer

    def _values(self, packed: Tensor, scales: Tensor) -> Tensor:
        values = self.levels[unpack_elements(packed, self.num_bits, self.in_features).long()]
        return (values.unflatten(-1, (scales.shape[-1], -1)) * self.scale_values(scales).unsqueeze(-1)).flatten(-2)

    def settings(self) -> dict[str, Any]:
        names = ("in_features", "exponent_bits", "mantissa_bits", "scale_format", "outer")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, e{self.exponent_bits}m{self.mantissa_bits}, scales={self.scale_format}"


class FloatLinear(FloatRows):
    """A linear layer of small floats.

    Formats whose levels are at most 127 times the smallest, as those of 4 bits are, are multiplied as 8-bit integers;
    of others the dense weight is kept.

    Args:
        packed: See `FloatRows`.
        scales: See `FloatRows`.
        bias: [out] or None.
        settings: The other arguments of `FloatRows`.
    """

    kind: ClassVar[str] = "float_linear"

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None, **settings: Any) -> None:
        super().__init__(packed, scales, **settings)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._held: HeldRows | Tensor | None = None
        self._held_of: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, codes: FloatCodes, bias: Tensor | None) -> FloatLinear:
        """Pack the codes of a weight [out, in]."""
        return cls(*stored_tensors(codes), None if bias is None else bias.detach(), **settings_of(codes))

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Mapping[str, Any]) -> FloatLinear:
        return cls(tensors["packed"], tensors["scales"], bias, **settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """Multiply tokens [..., in] of any float dtype."""
        packed, scales = self._held_of or (None, None)
        # Moving or loading a module gives it other tensors.
        if self._held is None or packed is not self.packed or scales is not self.scales:
            self._held, self._held_of = self._as_held(), (self.packed, self.scales)
        held = self._held
        out = held.multiply(tokens) if isinstance(held, HeldRows) else F.linear(tokens, held.to(tokens.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _as_held(self) -> HeldRows | Tensor:
        levels = self.levels
        step = levels[levels > 0].min()
        steps = levels / step
        if bool(steps.abs().max() > _MOST):
            return self.weight_values()
        codes = unpack_elements(self.packed, self.num_bits, self.in_features).long()
        integers = (steps + (_MOST + 1)).to(torch.uint8)[codes]
        return HeldRows(integers, self.scale_values(self.scales) * step, 8, self.in_features)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own.
        return {**self.__dict__, "_held": None, "_held_of": None}


class FloatEmbedding(CodedTable, FloatRows):
    """A table [num_embeddings, dim] of small floats."""

    kind: ClassVar[str] = "float_embedding"

    @classmethod
    def of(cls, codes: FloatCodes) -> FloatEmbedding:
        """Pack the codes of a table."""
        return cls(*stored_tensors(codes), **settings_of(codes))


def stored_tensors(codes: FloatCodes) -> tuple[Tensor, Tensor]:
    """Return the packed codes of a weight [out, in], and its scales, [out, groups] of bytes or fp32."""
    out_features = codes.values.shape[0]
    scales = codes.scales if codes.scales.dtype == torch.float32 else codes.scales.view(torch.uint8)
    scales = scales.reshape(-1, scales.shape[-1]).expand(out_features, -1).contiguous()
    return pack_elements(codes.values, codes.num_bits), scales


def settings_of(codes: FloatCodes) -> dict[str, Any]:
    """Return what `FloatRows` is told of `codes` beside the tensors."""
    return {
        "in_features": codes.values.shape[-1],
        "exponent_bits": codes.exponent_bits,
        "mantissa_bits": codes.mantissa_bits,
        "scale_format": next(name for name, dtype in SCALES.items() if dtype == codes.scales.dtype),
        "outer": 1.0 if codes.outer is None else codes.outer.item(),
    }


def form_of(codes: FloatCodes) -> str:
    """Return the name of the format that `codes` are in; that of their elements where it has none."""
    element = f"e{codes.exponent_bits}m{codes.mantissa_bits}"
    group_size = codes.values.shape[-1] // codes.scales.shape[-1]
    return FORMS.get((element, settings_of(codes)["scale_format"], group_size), element)
