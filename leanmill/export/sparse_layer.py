"""A linear layer for evaluation that holds a 2:4 weight as values and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from leanmill.export.stored_layer import StoredLayer


class SparseLinear(StoredLayer):
    """A linear layer of a 2:4 weight [out, in].

    Args:
        values: bf16 [out, in / 2].
        meta: int16 [out, in / 16], in the order that CUTLASS has.
        bias: [out] or None.
        in_features: in.
    """

    kind: ClassVar[str] = "2:4"
    stored: ClassVar[tuple[str, ...]] = ("values", "meta")
    values: Tensor
    meta: Tensor

    def __init__(self, values: Tensor, meta: Tensor, bias: Tensor | None, *, in_features: int) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("meta", meta)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = in_features, values.shape[0]
        self._dense: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> SparseLinear:
        """Take the values and metadata of a weight [out, in] that keeps at most 2 of every 4."""
        values, meta = sparse_semi_structured_from_dense_cutlass(weight.detach().to(torch.bfloat16))
        return cls(values, meta, None if bias is None else bias.detach(), in_features=weight.shape[1])

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Mapping[str, Any]) -> SparseLinear:
        return cls(tensors["values"], tensors["meta"], bias, **settings)

    def weight_values(self) -> Tensor:
        return sparse_semi_structured_to_dense_cutlass(self.values, self.meta).float()

    def weight_tensor(self) -> Tensor:
        """Return the weight as torch's semi-structured tensor; it multiplies on a GPU."""
        from torch.sparse import SparseSemiStructuredTensorCUTLASS

        return SparseSemiStructuredTensorCUTLASS(
            torch.Size((self.out_features, self.in_features)),
            packed=self.values, meta=self.meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None,
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Multiply tokens [..., in]."""
        if tokens.device.type == "cuda" and tokens.dtype == self.values.dtype:
            flat = F.linear(tokens.reshape(-1, self.in_features), self.weight_tensor(), self.bias)
            return flat.view(*tokens.shape[:-1], self.out_features)
        if self._dense is None or self._dense.dtype != tokens.dtype or self._dense.device != tokens.device:
            self._dense = self.weight_values().to(tokens.dtype)
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        return F.linear(tokens, self._dense, bias)

    def settings(self) -> dict[str, Any]:
        return {"in_features": self.in_features}
