"""Cross-entropy of a linear head in plain tensor code: the definition, whole and a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Form:
    """What is computed from a token's raw logits x (`linear_cross_entropy` explains each)."""

    scale: float = 1.0
    softcap: float = 0.0
    """0 caps nothing."""
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def logits(self, raw: Tensor) -> Tensor:
        """Return the logits that the loss sees, at least fp32."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.scale
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: Form, ignore_index: int
) -> Tensor:
    """Return the losses [N] of hidden [N, H], fp32 (fp64 for fp64), 0 where the label is ignored.

    Holds all logits [N, V] at once, and autograd keeps several of their size.
    """
    logits = form.logits(F.linear(hidden, weight, bias))
    kept = labels != ignore_index
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, torch.where(kept, labels, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - target
    if form.label_smoothing:
        loss = (1 - form.label_smoothing) * loss + form.label_smoothing * (lse - logits.mean(-1))
    if form.z_loss:
        loss = loss + form.z_loss * lse.square()
    return torch.where(kept, loss, 0.0)


def cross_entropy_(
    raw: Tensor, labels: Tensor, row_scales: Tensor | None, form: Form, *, wants_gradient: bool
) -> Tensor:
    """Return the losses of raw logits [N, V] and write their gradient over them, times `row_scales`.

    Args:
        raw: The head's output, any float dtype; overwritten if `wants_gradient`.
        labels: [N] int64; negative ones cost nothing.
        row_scales: Gradient of each token's loss [N], or None for ones.
        form: The loss.
        wants_gradient: Whether to write.
    """
    logits = form.logits(raw)
    kept = labels >= 0
    index = torch.where(kept, labels, 0).unsqueeze(-1)
    lse = logits.logsumexp(-1)
    loss = lse - logits.gather(-1, index).squeeze(-1)
    if form.label_smoothing:
        loss = (1 - form.label_smoothing) * loss + form.label_smoothing * (lse - logits.mean(-1))
    if form.z_loss:
        loss = loss + form.z_loss * lse.square()
    if wants_gradient:
        slope = 1 - (logits / form.softcap).square() if form.softcap else None
        gradient = (logits - lse.unsqueeze(-1)).exp_().mul_((1 + 2 * form.z_loss * lse).unsqueeze(-1))
        gradient -= form.label_smoothing / logits.shape[-1]
        gradient.scatter_add_(-1, index, torch.full_like(gradient[..., :1], form.label_smoothing - 1))
        if slope is not None:
            gradient *= slope
        gradient *= form.scale
        if row_scales is not None:
            gradient *= row_scales.unsqueeze(-1)
        # A row without a label may hold infinities, whose product with 0 is NaN.
        raw.copy_(torch.where(kept.unsqueeze(-1), gradient, 0.0))
    return torch.where(kept, loss, 0.0)
