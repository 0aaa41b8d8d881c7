"""All-to-all of rows between ranks, begun and awaited apart, differentiable.

What is computed between the two runs while rows travel. Backward mirrors it: awaiting sends the gradient
back the way the rows came, and begins that without waiting for it. Collectives start in the order of
the program in forward, and in the reverse of it in backward, so on every rank in the same order.

Both halves are torch's functional collectives: operators that the policy of a checkpoint can name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Splits:
    """How rows are shared out between the ranks of a group."""

    send: list[int]
    """Rows to each rank."""
    receive: list[int]
    """Rows from each rank."""
    group: dist.ProcessGroup

    def reversed(self) -> Splits:
        """Those of the way back."""
        return Splits(self.receive, self.send, self.group)


class Travelling:
    """Rows under way to other ranks; `arrive` waits for those that come here. Differentiable."""

    def __init__(self, rows: Tensor, splits: Splits) -> None:
        """Begin to send `rows` [P, ...], sorted by the rank they go to."""
        self._there, self._back = _Trip(splits), _Trip(splits.reversed())
        self._carrier: Tensor = _BeginRows.apply(rows, self._there, self._back)

    def arrive(self) -> Tensor:
        """Return the rows that have come [M, ...], sorted by the rank they are from."""
        return _EndRows.apply(self._carrier, self._there, self._back)  # type: ignore[no-any-return]


class TravellingRouting:
    """Combine weights and expert numbers of rows, under way in one message. Differentiable in the weights."""

    def __init__(self, weights: Tensor, index: Tensor, splits: Splits) -> None:
        """Begin to send weights [P, K], fp32 or fp64, and index [P, K] int64, below 2^31."""
        self._there, self._back = _Trip(splits), _Trip(splits.reversed())
        self._carrier: Tensor = _BeginRouting.apply(weights, index, self._there, self._back)

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Return the weights [M, K] and index [M, K] that have come."""
        return _EndRouting.apply(self._carrier, self._there, self._back)  # type: ignore[no-any-return]


class _Trip:
    """One all-to-all."""

    def __init__(self, splits: Splits) -> None:
        self._splits = splits
        self._arriving: Tensor | None = None

    def begin(self, rows: Tensor) -> None:
        splits = self._splits
        self._arriving = torch.ops._c10d_functional.all_to_all_single(
            rows.contiguous(), splits.receive, splits.send, splits.group.group_name
        )

    def end(self) -> Tensor:
        assert self._arriving is not None, "a trip ends once, after it has begun"
        arrived, self._arriving = torch.ops._c10d_functional.wait_tensor(self._arriving), None
        return arrived

    def __del__(self) -> None:
        # A recomputation stops at the last tensor that backward needs, with results still on their way:
        # torch keeps their memory until somebody waits.
        if self._arriving is not None:
            self.end()


class _BeginRows(torch.autograd.Function):
    """Begins a trip; the gradient comes with the trip back, which `_EndRows` has begun in backward.

    The rows are not there yet: an empty tensor stands for them, and ties the two together.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: _Trip, back: _Trip) -> Tensor:
        ctx.back = back
        there.begin(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.end(), None, None


class _EndRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, there: _Trip, back: _Trip) -> Tensor:
        ctx.back = back
        return there.end()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.back.begin(grad)
        return grad.new_empty(0), None, None


class _BeginRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, index: Tensor, there: _Trip, back: _Trip) -> Tensor:
        ctx.back = back
        there.begin(torch.cat([weights.contiguous().view(torch.int32), index.to(torch.int32)], dim=1))
        return weights.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back.end(), None, None, None


class _EndRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, there: _Trip, back: _Trip) -> tuple[Tensor, Tensor]:
        ctx.back = back
        packed = there.end()
        index_at = packed.shape[1] * carrier.element_size() // (4 + carrier.element_size())
        # A copy even of one row or none, whose strides and offset might not allow another dtype.
        weights = packed[:, :index_at].clone(memory_format=torch.contiguous_format).view(carrier.dtype)
        index = packed[:, index_at:].to(torch.int64)
        ctx.mark_non_differentiable(index)
        return weights, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        ctx.back.begin(grad)
        return grad.new_empty(0), None, None
