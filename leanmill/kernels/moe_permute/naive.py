"""Permutation by expert in plain tensor code, differentiable by autograd: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (order [N], positions [T, K], counts [E]) of a stable sort of the T x K copies."""
    experts = expert_index.reshape(-1)
    order = torch.sort(experts, stable=True).indices
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device)
    counts = counts.scatter_add_(0, experts, torch.ones_like(experts))[:num_experts]
    return order, positions.view(expert_index.shape), counts


def invert(positions: Tensor) -> Tensor:
    """Return the copies in sorted order [N] for the places [T, K] of the copies."""
    flat = positions.reshape(-1)
    return torch.empty_like(flat).scatter_(0, flat, torch.arange(flat.numel(), device=flat.device))


def spread(tokens: Tensor, positions: Tensor, weights: Tensor | None = None, num_rows: int | None = None) -> Tensor:
    """Return the first `num_rows` of rows [N, H] with row `positions[t, k]` equal to `weights[t, k] * tokens[t]`."""
    copies = tokens.unsqueeze(1).expand(-1, positions.shape[1], -1)
    if weights is not None:
        copies = copies * weights.to(tokens.dtype).unsqueeze(-1)
    return copies.reshape(positions.numel(), tokens.shape[1])[invert(positions)[:num_rows]]


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return tokens [T, H]: sum over k of `weights[t, k] * rows[positions[t, k]]`; rows past the last are zero."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    copies = _all_rows(rows, positions)[positions].to(wide)
    if weights is not None:
        copies = copies * weights.to(wide).unsqueeze(-1)
    return copies.sum(1).to(rows.dtype)


def dots(rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return [T, K]: the inner products of each token with its K rows, in fp32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (_all_rows(rows, positions)[positions].to(wide) * tokens.to(wide).unsqueeze(1)).sum(-1)


def _all_rows(rows: Tensor, positions: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(positions.numel() - rows.shape[0], rows.shape[1])])
