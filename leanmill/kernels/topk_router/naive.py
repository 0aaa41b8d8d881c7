"""The router in plain tensor code, differentiable by autograd: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def topk_router(
    logits: Tensor, bias: Tensor | None, top_k: int, *, is_sigmoid: bool, normalise: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (weights [T, K], index [T, K], counts [E], z-loss, mean probability [E])."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if is_sigmoid else wide.softmax(-1)
    keys = _keys(wide.detach(), scores.detach(), bias)
    index = keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    # A softmax of these is the scores over their sum, without the underflow of either.
    logarithms = F.logsigmoid(wide) if is_sigmoid else wide
    weights = logarithms.gather(-1, index).softmax(-1) if normalise else scores.gather(-1, index)
    counts = torch.bincount(index.reshape(-1), minlength=logits.shape[1])
    num_tokens = max(logits.shape[0], 1)
    z_loss = wide.logsumexp(-1).square().sum() / num_tokens
    probabilities = logarithms.softmax(-1) if is_sigmoid else scores
    return weights * scaling, index, counts, z_loss, probabilities.sum(0) / num_tokens


def _keys(logits: Tensor, scores: Tensor, bias: Tensor | None) -> Tensor:
    """Return what experts are chosen by [T, E], largest first.

    Scores rise with logits, so without a bias these say the same, and still tell apart scores that
    round to one number. They also rank a token whose softmax is NaN.
    """
    if bias is None:
        return logits
    is_lost = logits.softmax(-1).isnan().any(-1, keepdim=True)
    return torch.where(is_lost, logits, scores + bias.to(logits.dtype))


def backward(
    logits: Tensor,
    index: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    is_sigmoid: bool,
    normalise: bool,
    scaling: float,
) -> Tensor:
    """Return the gradient of the logits, given those of weights, z-loss and mean probability.

    Written out, because inside an operator autograd does not record.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    grad_weights, grad_z, grad_mean = (g.to(wide.dtype) for g in grads)
    num_tokens = max(logits.shape[0], 1)
    soft = wide.softmax(-1)
    scores = wide.sigmoid() if is_sigmoid else soft
    # d log score / d logit, apart from what all logits of a softmax share.
    slope = 1 - scores if is_sigmoid else torch.ones_like(scores)
    logarithms = F.logsigmoid(wide) if is_sigmoid else wide
    shares = logarithms.softmax(-1)
    grad = shares * slope * (grad_mean - (shares * grad_mean).sum(-1, keepdim=True)) / num_tokens
    grad = grad + soft * wide.logsumexp(-1, keepdim=True) * (2 * grad_z / num_tokens)
    chosen_slope = slope.gather(-1, index)
    if normalise:
        weights = logarithms.gather(-1, index).softmax(-1)
        inner = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    else:
        weights, inner = scores.gather(-1, index), grad_weights
        if not is_sigmoid:
            grad = grad - scaling * soft * (weights * grad_weights).sum(-1, keepdim=True)
    return grad.scatter_add(-1, index, scaling * weights * chosen_slope * inner).to(logits.dtype)
