"""The router in plain tensor code, differentiable by autograd: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.topk_router.settings import Settings, num_counted


def topk_router(
    logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (weights [T, K], index [T, K], counts [S, E], z-loss, mean probability [S, E])."""
    wide = _wide(logits, token_mask)
    scores = wide.sigmoid() if settings.is_sigmoid else wide.softmax(-1)
    index, is_choice = _choose(wide.detach(), scores.detach(), bias, settings)
    # A softmax of these is the scores over their sum, without the underflow of either.
    logarithms = F.logsigmoid(wide) if settings.is_sigmoid else wide
    if settings.normalise:
        weights = logarithms.gather(-1, index).masked_fill(~is_choice, -torch.inf).softmax(-1)
    else:
        weights = scores.gather(-1, index)
    if token_mask is not None:
        is_choice = is_choice & token_mask.unsqueeze(-1)
    index = index.masked_fill(~is_choice, logits.shape[1])
    weights = (weights * settings.scaling).masked_fill(~is_choice, 0)
    return weights, index, *side_sums(logits, index, token_mask, settings)


def side_sums(
    logits: Tensor, index: Tensor, token_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (counts [S, E], z-loss, mean probability [S, E]) of tokens that were sent to experts `index` [T, K].

    Only the score and the number of sequences are asked of the settings.
    """
    wide = _wide(logits, token_mask)
    # The shares of sigmoids are the softmax of their logarithms, without the underflow.
    probabilities = (F.logsigmoid(wide) if settings.is_sigmoid else wide).softmax(-1)
    squares = wide.logsumexp(-1).square()
    if token_mask is not None:
        probabilities = probabilities.masked_fill(~token_mask.unsqueeze(-1), 0)
        squares = squares.masked_fill(~token_mask, 0)
    counted = num_counted(logits, token_mask, settings).to(wide.dtype)
    sums = probabilities.reshape(settings.num_sequences, -1, logits.shape[1]).sum(1)
    means = sums / counted.clamp(min=1).unsqueeze(-1)
    return counts(index, logits.shape[1], settings.num_sequences), squares.sum() / counted.sum().clamp(min=1), means


def _wide(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Whatever a masked token holds, and NaN too, reaches nobody.
    return wide if token_mask is None else torch.where(token_mask.unsqueeze(-1), wide, 0.0)


def _choose(logits: Tensor, scores: Tensor, bias: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the best experts [T, K], and whether each is open to its token."""
    keys = _keys(logits, scores, bias)
    if settings.num_groups > 1:
        keys = keys.masked_fill(~_open_experts(keys, scores, bias, settings), -torch.inf)
    values, index = keys.sort(dim=-1, descending=True, stable=True)
    values, index = values[:, : settings.top_k], index[:, : settings.top_k]
    return index, values != -torch.inf


def _keys(logits: Tensor, scores: Tensor, bias: Tensor | None) -> Tensor:
    """Return what experts are chosen by [T, E], largest first; -inf is closed to the token.

    Scores rise with logits, so without a bias these say the same, and still tell apart scores that
    round to one number. They also rank a token whose softmax is NaN.
    """
    if bias is None:
        return logits
    is_lost = logits.softmax(-1).isnan().any(-1, keepdim=True)
    keys = (scores + bias.to(logits.dtype)).masked_fill(logits == -torch.inf, -torch.inf)
    return torch.where(is_lost, logits, keys)


def _open_experts(keys: Tensor, scores: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Whether each expert lies in one of its token's best groups, bool [T, E]."""
    # Sums of several say something else of logits than of scores; the largest does not.
    if settings.num_best > 1 and bias is None:
        keys = scores.masked_fill(keys == -torch.inf, -torch.inf)
    size = keys.shape[1] // settings.num_groups
    members = keys.unflatten(1, (settings.num_groups, size))
    values = members.sort(dim=-1, descending=True).values[..., : settings.num_best]
    is_open = values != -torch.inf
    sums = values.masked_fill(~is_open, 0).sum(-1).masked_fill(~is_open.any(-1), -torch.inf)
    best = sums.sort(dim=-1, descending=True, stable=True).indices[:, : settings.open_groups]
    is_best = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, best, True)
    return is_best.repeat_interleave(size, 1)


def counts(index: Tensor, num_experts: int, num_sequences: int) -> Tensor:
    """Copies that each expert takes of each sequence, int64 [S, E]; an index of `num_experts` is none."""
    rows = index.reshape(num_sequences, -1)
    ones = torch.ones_like(rows)
    return ones.new_zeros(len(rows), num_experts + 1).scatter_add_(1, rows, ones)[:, :num_experts].contiguous()


def backward(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
) -> Tensor:
    """Return the gradient of the logits, given those of weights, z-loss and mean probability.

    Written out, because inside an operator autograd does not record.
    """
    wide = _wide(logits, token_mask)
    grad_weights, grad_z, grad_mean = (g.to(wide.dtype) for g in grads)
    counted = num_counted(logits, token_mask, settings)
    grad_z = grad_z / counted.sum().clamp(min=1)
    length = logits.shape[0] // settings.num_sequences
    grad_mean = (grad_mean / counted.clamp(min=1).unsqueeze(-1)).repeat_interleave(length, 0)
    soft = wide.softmax(-1)
    scores = wide.sigmoid() if settings.is_sigmoid else soft
    # d log score / d logit, apart from what all logits of a softmax share.
    slope = 1 - scores if settings.is_sigmoid else torch.ones_like(scores)
    logarithms = F.logsigmoid(wide) if settings.is_sigmoid else wide
    shares = logarithms.softmax(-1)
    grad = shares * slope * (grad_mean - (shares * grad_mean).sum(-1, keepdim=True))
    grad = grad + soft * wide.logsumexp(-1, keepdim=True) * (2 * grad_z)
    is_choice = index < logits.shape[1]
    index = index.masked_fill(~is_choice, 0)
    grad_weights = grad_weights.masked_fill(~is_choice, 0)
    if settings.normalise:
        weights = logarithms.gather(-1, index).masked_fill(~is_choice, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~is_choice, 0)
        inner = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    else:
        weights, inner = scores.gather(-1, index).masked_fill(~is_choice, 0), grad_weights
        if not settings.is_sigmoid:
            grad = grad - settings.scaling * soft * (weights * grad_weights).sum(-1, keepdim=True)
    grad = grad.scatter_add(-1, index, settings.scaling * weights * slope.gather(-1, index) * inner)
    if token_mask is not None:
        grad = grad.masked_fill(~token_mask.unsqueeze(-1), 0)
    return grad.to(logits.dtype)
