"""What travels between the ranks of a tensor-parallel group, forward and backward (Megatron-LM, arXiv:1909.08053).

Pairs of collectives, each the other's gradient: nothing and a sum, a sum and nothing, all parts and a cut, a cut and
all parts; of tokens, all parts and a sum of which each rank keeps a part, and that sum and all parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.core.weight_split import WeightSplit


_reduce_scatter: Any = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
"""By the name that this PyTorch has for it; 2.13 renamed it."""


class GroupSplit(WeightSplit):
    """A weight whose rows or columns the ranks of a group have evenly.

    Args:
        group: The ranks, in the order of their parts.
        by_rows: See `WeightSplit`.
        gathers_output: See `WeightSplit`.
        splits_input: See `WeightSplit`.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, by_rows: bool, gathers_output: bool = False, splits_input: bool = False
    ) -> None:
        super().__init__(by_rows=by_rows, gathers_output=gathers_output, splits_input=splits_input)
        self.group, self._rank = group, group.rank()

    @property
    def rank(self) -> int:
        return self._rank

    def enter(self, tensor: Tensor) -> Tensor:
        return _Enter.apply(tensor, self.group)  # type: ignore[no-any-return]

    def total(self, tensor: Tensor) -> Tensor:
        return _Total.apply(tensor, self.group)  # type: ignore[no-any-return]

    def whole(self, part: Tensor, dim: int) -> Tensor:
        return _Whole.apply(part, dim, self.group)  # type: ignore[no-any-return]

    def part(self, whole: Tensor, dim: int) -> Tensor:
        return _Part.apply(whole, dim, self.group)  # type: ignore[no-any-return]

    def largest(self, tensor: Tensor) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=self.group)
        return result


class PickedRows(GroupSplit):
    """A weight that every rank holds whole, and of which each multiplies with rows that do not lie together.

    What a rank does not multiply with has a gradient of zero there: gradients of `held` are to be added up.

    Args:
        group: See `GroupSplit`.
        rows: Of each rank.
    """

    def __init__(self, group: dist.ProcessGroup, rows: Sequence[Sequence[int]]) -> None:
        super().__init__(group, by_rows=True)
        self._rows = torch.tensor(rows[self.rank])

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self._rows.to(tensor.device))

    def whole(self, part: Tensor, dim: int) -> Tensor:
        """Return it: a weight is here already."""
        return part if dim == 0 else super().whole(part, dim)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's rows of a weight that all ranks computed; its gradient is the sum over ranks."""
        return self.held(self.enter(whole)) if dim == 0 else super().part(whole, dim)


def summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over the ranks of `group`; the argument is left as it is."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def gathered(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Return the parts of all ranks of `group` along `dim`."""
    mine = part.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim)


def sum_scattered(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part along dim 1 of the sum over the ranks of `group`, which all give [B, S, ...]."""
    size, batch = group.size(), whole.shape[0]
    by_rank = whole.detach().reshape(batch, size, whole.shape[1] // size, *whole.shape[2:]).transpose(0, 1)
    flat = by_rank.reshape(size * batch, *by_rank.shape[2:]).contiguous()
    # Functional, so that selective recomputation knows it and keeps what it returns.
    return functional.wait_tensor(_reduce_scatter(flat, "sum", 0, group))  # type: ignore[no-any-return]


def cut(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part along `dim`, in memory of its own."""
    size = whole.shape[dim] // group.size()
    return whole.narrow(dim, group.rank() * size, size).clone(memory_format=torch.contiguous_format)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return summed(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(part, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return cut(grad, ctx.dim, ctx.group), None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return cut(whole, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.dim, ctx.group), None, None


class TokenGather(torch.autograd.Function):
    """All tokens [B, S, ...] of parts [B, S / n, ...]; gradients of ranks are added up, each for its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(part, 1, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_scattered(grad, ctx.group), None


class TokenScatter(torch.autograd.Function):
    """Of the sum over ranks of [B, S, ...] each one's own part [B, S / n, ...]; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_scattered(whole, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, 1, ctx.group), None
