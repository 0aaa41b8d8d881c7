"""What layers share that hold their weight in another form than a plain one, on disk and in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class StoredLayer(nn.Module):
    """A layer for evaluation whose weight [out, in] lies in tensors of its own, see `packed_folder`."""

    kind: ClassVar[str]
    """What its entry of the folder's list calls it."""
    stored: ClassVar[tuple[str, ...]]
    """Names of its tensors."""
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @classmethod
    @abstractmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Mapping[str, Any]) -> StoredLayer:
        """Make the layer of what was stored: `stored`, the bias, and `settings`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what the tensors do not say, JSON-able."""

    @abstractmethod
    def weight_values(self) -> Tensor:
        """Return the weight [out, in], fp32."""

    @property
    def stored_bytes(self) -> int:
        """Of the weight's tensors."""
        return sum(getattr(self, name).nbytes for name in self.stored)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """Return the plain layer of the same weight, in `dtype`."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight_values().to(dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class CodedRows(StoredLayer):
    """A weight [out, in] as codes of rows, and scales of groups within a row.

    Args:
        packed: uint8 [out, bytes].
        scales: [out, groups].
        in_features: Codes of a row, which bytes do not tell.
    """

    stored: ClassVar[tuple[str, ...]] = ("packed", "scales")
    packed: Tensor
    scales: Tensor

    def __init__(self, packed: Tensor, scales: Tensor, *, in_features: int) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.bias = None

    def weight_values(self) -> Tensor:
        return self._values(self.packed, self.scales)

    @abstractmethod
    def _values(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Return some rows [n, in], fp32, of their codes [n, bytes] and scales [n, groups]."""


class CodedTable(CodedRows):
    """A table [num_embeddings, dim] of coded rows, which are decoded as they are looked up."""

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Mapping[str, Any]) -> Self:
        return cls(tensors["packed"], tensors["scales"], **settings)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., dim] of `ids` [...] int64, fp32."""
        flat = ids.flatten()
        return self._values(self.packed[flat], self.scales[flat]).view(*ids.shape, self.in_features)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        table = nn.Embedding(self.out_features, self.in_features, device="meta")
        table.weight = nn.Parameter(self.weight_values().to(dtype), requires_grad=False)
        return table
