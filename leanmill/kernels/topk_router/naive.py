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
    keys = scores.detach() if bias is None else scores.detach() + bias.to(wide.dtype)
    index = keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if normalise:
        # Equal to the chosen scores over their sum, without the underflow of either.
        logarithms = F.logsigmoid(wide) if is_sigmoid else wide
        weights = logarithms.gather(-1, index).softmax(-1)
    else:
        weights = scores.gather(-1, index)
    counts = torch.bincount(index.reshape(-1), minlength=logits.shape[1])
    num_tokens = max(logits.shape[0], 1)
    z_loss = wide.logsumexp(-1).square().sum() / num_tokens
    probabilities = scores / scores.sum(-1, keepdim=True) if is_sigmoid else scores
    return weights * scaling, index, counts, z_loss, probabilities.sum(0) / num_tokens


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
    shares = scores / scores.sum(-1, keepdim=True)
    grad = shares * slope * (grad_mean - (shares * grad_mean).sum(-1, keepdim=True)) / num_tokens
    grad = grad + soft * wide.logsumexp(-1, keepdim=True) * (2 * grad_z / num_tokens)
    chosen_slope = slope.gather(-1, index)
    if normalise:
        weights = (F.logsigmoid(wide) if is_sigmoid else wide).gather(-1, index).softmax(-1)
        inner = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    else:
        weights, inner = scores.gather(-1, index), grad_weights
        if not is_sigmoid:
            grad = grad - scaling * soft * (weights * grad_weights).sum(-1, keepdim=True)
    return grad.scatter_add(-1, index, scaling * weights * chosen_slope * inner).to(logits.dtype)
