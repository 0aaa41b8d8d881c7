"""Which tokens conflict with their expert, and the gradient that lowers their score there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.parallel.collectives import sum_over_ranks


def conflicts(gradient: Tensor, weights: Tensor, experts: Tensor, sums: Tensor, threshold: float) -> Tensor:
    """Return which copies of tokens conflict with their expert, bool [T, K].

    The gradient of a copy at its expert's output is its combine weight times that of the mixture's output, so that
    its cosine with the expert's mean is that of the latter.

    Args:
        gradient: fp32 [T, H]: of the mixture's output.
        weights: [T, K] combine weights.
        experts: int64 [T, K]; E where a place is empty.
        sums: fp32 [E, H]: the sum of copies' gradients by expert (`gradient_sums`); a mean has its direction.
        threshold: Cosines below are conflicts. A copy without a gradient has none.
    """
    num_experts = len(sums)
    cosines = gradient @ sums.T
    lengths = gradient.norm(dim=-1, keepdim=True) * sums.norm(dim=-1)
    cosines = cosines / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
    own = cosines.gather(1, experts.clamp(max=num_experts - 1))
    has_gradient = (gradient != 0).any(-1, keepdim=True) & (weights != 0)
    return (own < threshold) & (experts < num_experts) & has_gradient


def gradient_sums(gradient: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Return the sum of the gradients of each expert's copies, fp32 [E, H]."""
    sums = gradient.new_zeros(num_experts + 1, gradient.shape[-1])
    for place in range(experts.shape[1]):
        sums.index_add_(0, experts[:, place], gradient * weights[:, place : place + 1].to(gradient.dtype))
    return sums[:-1]


def elimination(logits: Tensor, experts: Tensor, is_conflict: Tensor) -> tuple[Tensor, Tensor]:
    """Return the conflict elimination loss and its gradient in the logits.

    The loss of a copy that conflicts is -log softmax(-z)_e, z its token's logits and e its expert: the lower z_e, the
    lower it is. It is a mean over all copies.

    Args:
        logits: fp32 [T, E]; -inf where an expert is closed.
        experts: int64 [T, K]; E where a place is empty.
        is_conflict: bool [T, K].

    Returns:
        fp32 (): the loss; fp32 [T, E].
    """
    num_experts = logits.shape[-1]
    inverted = torch.where(logits.isinf(), logits, -logits)
    log_shares = inverted.log_softmax(-1)
    own = log_shares.gather(1, experts.clamp(max=num_experts - 1))
    num_copies = (experts < num_experts).sum().clamp(min=1)
    loss = -own.masked_fill(~is_conflict, 0.0).sum() / num_copies
    chosen = logits.new_zeros(len(logits), num_experts + 1).scatter_add(1, experts, is_conflict.to(logits.dtype))
    away = chosen[:, :-1] - is_conflict.sum(-1, keepdim=True) * log_shares.exp()
    return loss, away / num_copies


@torch.library.custom_op("leanmill::conflict_gradient", mutates_args={"loss_sums", "share_sums"})
def conflict_gradient(
    gradient: Tensor,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    scale: Tensor,
    factor: Tensor,
    loss_sums: Tensor,
    share_sums: Tensor,
    threshold: float,
    is_global: bool,
) -> Tensor:
    """Return scale x factor x the gradient of the elimination loss in the logits [T, E], and note loss and share.

    Whole in compiled code: with `is_global` it is a collective.

    Args:
        gradient: [T, H]: of the mixture's output.
        logits: [T, E].
        weights: [T, K].
        experts: int64 [T, K].
        scale: fp32 (1,): of losses that are means over micro-batches.
        factor: fp32 (1,): weight of the loss.
        loss_sums: fp32 (3,): an account's sums; the loss is added.
        share_sums: fp32 (3,): another's; the share of copies that conflict is added.
        threshold: See `conflicts`.
        is_global: Whether means are over the copies of all ranks.
    """
    wide, logits = gradient.float(), logits.float()
    sums = gradient_sums(wide, weights, experts, logits.shape[-1])
    if is_global:
        sums = sum_over_ranks(sums)
    found = conflicts(wide, weights, experts, sums, threshold)
    loss, away = elimination(logits, experts, found)
    one = torch.ones_like(factor)
    share = found.sum() / (experts < logits.shape[-1]).sum().clamp(min=1)
    loss_sums.add_(torch.cat([loss * one, loss * factor, one]))
    share_sums.add_(torch.cat([share * one, 0 * one, one]))
    return away * (scale * factor)


@conflict_gradient.register_fake
def _(gradient: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)


class Eliminate(torch.autograd.Function):
    """Identity on a mixture's output; in backward its gradient says which tokens conflict, and logits get theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        logits: Tensor,
        weights: Tensor,
        experts: Tensor,
        scale: Tensor,
        factor: Tensor,
        loss_sums: Tensor,
        share_sums: Tensor,
        threshold: float,
        is_global: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, weights, experts, scale, factor)
        ctx.sums, ctx.settings = (loss_sums, share_sums), (threshold, is_global)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, weights, experts, scale, factor = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        away = conflict_gradient(rows, logits, weights, experts, scale, factor, *ctx.sums, *ctx.settings)
        return gradient, away.to(logits.dtype), *[None] * 8
