"""Divergence of a chunk of logits and its gradient written over them, in tensor code.

With h the derivative of the divergence by a bucket's student mass q, the gradient by a logit is
T q (h - sum of q h); see naive.py for the divergences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanmill.kernels.linear_cross_entropy import naive as cross_entropy
from leanmill.kernels.linear_kl.naive import Form, log_softmax, with_tail


def divergence_(
    raw: Tensor, teacher: Tensor, labels: Tensor, form: Form, *, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return T^2 x divergence and cross-entropy of student logits, and write the loss's gradient over them.

    Args:
        raw: Student logits [n, V]; overwritten if `wants_gradient`.
        teacher: Teacher logits [n, W]. Only the first min(V, W) columns of both are compared.
        labels: [n] int64; negative ones cost nothing. Read for cross-entropy, else only their sign.
        form: The loss.
        wants_gradient: Whether to write.

    Returns:
        Both [n], unweighted, fp32 (fp64 for fp64); cross-entropy is 0 where it is not wanted.
    """
    shared = min(raw.shape[-1], teacher.shape[-1])
    log_q = log_softmax(raw[:, :shared], form.temperature)
    log_p = log_softmax(teacher[:, :shared], form.temperature)
    value, gradient = _of_buckets(log_p, log_q, form)
    return _finish(raw, value, gradient, labels, form, wants_gradient)


def top_k_divergence_(
    raw: Tensor, indices: Tensor, log_probs: Tensor, labels: Tensor, form: Form, *, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Do the same against a top-k cache; see `naive.top_k_divergence`."""
    log_q = log_softmax(raw, form.temperature)
    of_taken = log_q.gather(-1, indices)
    others = log_q.scatter(-1, indices, -torch.inf)
    of_tail = others.logsumexp(-1, keepdim=True)
    value, gradient = _of_buckets(with_tail(log_probs.to(log_q.dtype)), torch.cat([of_taken, of_tail], -1), form)
    # The tail's gradient is shared out by mass; a tail without mass has none to share.
    share = (others - torch.where(of_tail == -torch.inf, 0.0, of_tail)).exp_()
    spread = share.mul_(gradient[:, -1:]).scatter_(-1, indices, gradient[:, :-1])
    return _finish(raw, value, spread, labels, form, wants_gradient)


def _of_buckets(log_p: Tensor, log_q: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return T^2 x divergence of rows, and its gradient by logits of the buckets."""
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    if form.kind == "forward":
        value, slope = _sum(p, gap), q - p
    elif form.kind == "reverse":
        value = -_sum(q, gap)
        slope = -_times(q, gap + value.unsqueeze(-1))
    else:
        # log(m / q), from which both divergences follow.
        lift = torch.logaddexp(gap + math.log(form.beta), torch.full_like(gap, math.log1p(-form.beta)))
        of_student = -_sum(q, lift)
        value = form.beta * _sum(p, gap - lift) + (1 - form.beta) * of_student
        slope = _times(q, lift + of_student.unsqueeze(-1)).mul_(form.beta - 1)
    return value * form.temperature**2, slope * form.temperature


def _times(mass: Tensor, factor: Tensor) -> Tensor:
    return torch.where(mass == 0, 0.0, mass * factor)


def _sum(mass: Tensor, factor: Tensor) -> Tensor:
    return _times(mass, factor).sum(-1)


def _finish(
    raw: Tensor, value: Tensor, gradient: Tensor, labels: Tensor, form: Form, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Add cross-entropy, drop what has no label, and write."""
    weight = form.cross_entropy_weight
    total, of_labels = torch.zeros_like(value), None
    if weight is not None:
        of_labels = raw.to(value.dtype, copy=True) if wants_gradient and weight else None
        source = raw if of_labels is None else of_labels
        plain = cross_entropy.Form()
        total = cross_entropy.cross_entropy_(source, labels, None, plain, wants_gradient=of_labels is not None)
    kept = labels >= 0
    if wants_gradient:
        gradient = torch.where(kept.unsqueeze(-1), gradient * form.divergence_weight, 0.0)
        if of_labels is None:
            raw.zero_()
        else:
            assert weight is not None
            raw.copy_(of_labels.mul_(weight))
            gradient += of_labels[:, : gradient.shape[-1]]
        raw[:, : gradient.shape[-1]] = gradient
    return torch.where(kept, value, 0.0), total
