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
        self._dense_of: tuple[Tensor, Tensor] | None = None

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
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        if tokens.device.type == "cuda" and tokens.dtype == self.values.dtype:
            flat = F.linear(tokens.reshape(-1, self.in_features), self.weight_tensor(), bias)
            return flat.view(*tokens.shape[:-1], self.out_features)
        return F.linear(tokens, self._dense_weight(tokens.dtype), bias)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        values, meta = self._dense_of or (None, None)
        # Moving a module gives it other tensors.
        is_stale = values is not self.values or meta is not self.meta
        if self._dense is None or self._dense.dtype != dtype or is_stale:
            self._dense, self._dense_of = self.weight_values().to(dtype), (self.values, self.meta)
        return self._dense

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]
        self._dense = self._dense_of = None  # what is loaded lands in the same tensors

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own.
        return {**self.__dict__, "_dense": None, "_dense_of": None}

    def settings(self) -> dict[str, Any]:
        return {"in_features": self.in_features}
