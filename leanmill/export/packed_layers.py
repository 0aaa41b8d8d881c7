"""Layers for evaluation that hold their weight as packed codes, on disk and in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from leanmill.core.facets import Codes
from leanmill.export.stored_layer import CodedRows, CodedTable
from leanmill.kernels.fake_quant.activations import quantise_activations
from leanmill.kernels.packed_matmul.held import HeldRows
from leanmill.kernels.packing.encoding import Encoding
from leanmill.kernels.packing.op import pack, unpack


class PackedRows(CodedRows):
    """A weight [out, in] as packed codes and scales.

    Args:
        packed: uint8 [out, bytes], what `packing.pack` returns.
        scales: fp32 [out, groups].
        in_features: Codes of a row, which bytes do not tell.
        encoding: How codes are packed.
        zero: The code that stands for zero.
    """

    def __init__(self, packed: Tensor, scales: Tensor, *, in_features: int, encoding: Encoding, zero: float) -> None:
        super().__init__(packed, scales, in_features=in_features)
        self.encoding, self.zero = encoding, zero

    def _values(self, packed: Tensor, scales: Tensor) -> Tensor:
        values = unpack(packed, self.encoding, self.in_features).float() - self.zero
        return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)

    def settings(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "encoding": self.encoding, "zero": self.zero}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, encoding={self.encoding}"


class PackedLinear(PackedRows):
    """A linear layer of packed codes.

    Args:
        packed: See `PackedRows`.
        scales: See `PackedRows`.
        bias: [out] or None.
        in_features: See `PackedRows`.
        encoding: See `PackedRows`.
        zero: See `PackedRows`.
        int8_activations: Round each token to 8 bits first, as BitNet b1.58 does.
    """

    kind: ClassVar[str] = "linear"

    def __init__(
        self, packed: Tensor, scales: Tensor, bias: Tensor | None, *,
        in_features: int, encoding: Encoding, zero: float, int8_activations: bool,
    ) -> None:  # fmt: skip
        super().__init__(packed, scales, in_features=in_features, encoding=encoding, zero=zero)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.int8_activations = int8_activations
        self._held: HeldRows | None = None

    @classmethod
    def of(cls, codes: Codes, bias: Tensor | None, *, int8_activations: bool) -> PackedLinear:
        """Pack the codes of a weight [out, in]."""
        return cls(
            *packed_tensors(codes), None if bias is None else bias.detach(), **settings_of(codes),
            int8_activations=int8_activations,
        )  # fmt: skip

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Mapping[str, Any]) -> PackedLinear:
        return cls(tensors["packed"], tensors["scales"], bias, **settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """Multiply tokens [..., in] of any float dtype."""
        if self.int8_activations and self.encoding != "ternary":
            tokens = quantise_activations(tokens)
        held = self._held
        # Moving or loading a module gives it other tensors.
        if held is None or held.packed is not self.packed or held.scales is not self.scales:
            held = self._held = HeldRows(
                self.packed, self.scales, self.encoding, self.in_features,
                zero=None if self.encoding == "ternary" else self.zero,
                int8_activations=self.int8_activations and self.encoding == "ternary",
            )  # fmt: skip
        out = held.multiply(tokens)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in a copy.
        return {**self.__dict__, "_held": None}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "int8_activations": self.int8_activations}


class PackedEmbedding(CodedTable, PackedRows):
    """A table [num_embeddings, dim] of packed codes."""

    kind: ClassVar[str] = "embedding"

    @classmethod
    def of(cls, codes: Codes) -> PackedEmbedding:
        """Pack the codes of a table."""
        return cls(*packed_tensors(codes), **settings_of(codes))


def packed_tensors(codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the packed codes of a weight [out, in], and its scales as fp32 [out, groups]."""
    out_features = codes.values.shape[0]
    scales = codes.scales.float().reshape(-1, codes.scales.shape[-1]).expand(out_features, -1).contiguous()
    return pack(codes.values, codes.encoding), scales


def settings_of(codes: Codes) -> dict[str, Any]:
    """Return what `PackedRows` is told of `codes` beside the tensors."""
    return {"in_features": codes.values.shape[-1], "encoding": codes.encoding, "zero": codes.zero}
