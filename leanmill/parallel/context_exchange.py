"""What travels between ranks that each have a part of every row, forward and backward.

Both are linear: the gradient of a piece goes back to the rank that the piece came from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def heads_for_rows(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give heads away for the rest of the rows: [B, H, S / n, D] -> [B, H / n, S, D] (Ulysses, arXiv:2309.14509)."""
    num_ranks, (batch, heads, length, size) = group.size(), part.shape
    pieces = part.view(batch, num_ranks, heads // num_ranks, length, size).transpose(0, 1)
    arrived: Tensor = _Swap.apply(pieces, group)  # of rank r come places [r S / n, (r + 1) S / n)
    return arrived.permute(1, 2, 0, 3, 4).reshape(batch, heads // num_ranks, num_ranks * length, size)


def rows_for_heads(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo `heads_for_rows`: [B, H / n, S, D] -> [B, H, S / n, D]."""
    num_ranks, (batch, heads, length, size) = group.size(), whole.shape
    pieces = whole.reshape(batch, heads, num_ranks, length // num_ranks, size).permute(2, 0, 1, 3, 4)
    arrived: Tensor = _Swap.apply(pieces, group)
    return arrived.transpose(0, 1).reshape(batch, num_ranks * heads, length // num_ranks, size)


def all_places(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the parts of all ranks: [B, H, S / n, D] -> [B, H, S, D]; in backward each gets the sum for its own."""
    arrived: Tensor = _Gather.apply(part, group)
    return arrived.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _swap(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = pieces.contiguous()
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    return arrived


class _Swap(torch.autograd.Function):
    """Piece r of the first dim goes to rank r, and comes back as a gradient."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swap(pieces, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swap(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    """[...] -> [n, ...]. Backward sends every rank what is for it and adds up here, in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        mine = part.contiguous()
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swap(grad, ctx.group).sum(0), None
