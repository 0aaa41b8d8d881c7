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
    raw: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    log_tail: Tensor | None,
    labels: Tensor,
    form: Form,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do the same against a top-k cache; see `naive.top_k_divergence`."""
    log_q = log_softmax(raw, form.temperature)
    of_taken = log_q.gather(-1, indices)
    others = log_q.scatter_(-1, indices, -torch.inf)
    of_tail = others.logsumexp(-1, keepdim=True)
    log_p = with_tail(log_probs, log_tail, raw.shape[-1]).to(log_q.dtype)
    stated = log_p.exp().sum(-1, keepdim=True)
    value, gradient = _of_buckets(log_p, torch.cat([of_taken, of_tail], -1), form, stated)
    # The tail's gradient is shared out by mass; a tail without mass has none to share.
    share = others.sub_(torch.where(of_tail == -torch.inf, 0.0, of_tail)).exp_()
    spread = share.mul_(gradient[:, -1:]).scatter_(-1, indices, gradient[:, :-1])
    return _finish(raw, value, spread, labels, form, wants_gradient)


def _of_buckets(log_p: Tensor, log_q: Tensor, form: Form, teacher_mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return T^2 x divergence of rows, and its gradient by logits of the buckets; overwrites both.

    Student's masses add up to 1; so do a teacher's, unless `teacher_mass` [n, 1] has the sums of a rounded cache.
    """
    gap = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    if form.kind == "forward":
        value = _sum(p, gap)
        slope = (q if teacher_mass is None else q.mul_(teacher_mass)).sub_(p)
    elif form.kind == "reverse":
        value = -_sum(q, gap)
        slope = _times(q, gap.add_(value.unsqueeze(-1))).neg_()
    else:
        over_teacher, over_student = _over_parts(gap, form.beta)
        of_student = -_sum(q, over_student)
        value = -form.beta * _sum(p, over_teacher) + (1 - form.beta) * of_student
        slope = _times(q, over_student.add_(of_student.unsqueeze(-1))).mul_(form.beta - 1)
    return value * form.temperature**2, slope.mul_(form.temperature)


def _over_parts(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(m / p) and log(m / q) of the mixture m, from log(p / q); an infinite gap keeps the first finite."""
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    smaller_adds = (gap + (log_beta - log_rest)).abs_().neg_().exp_().log1p_()
    over_teacher = (log_rest - gap).clamp_(min=log_beta).add_(smaller_adds)
    return over_teacher, smaller_adds.add_((gap + log_beta).clamp_(min=log_rest))


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
        gradient = torch.where(kept.unsqueeze(-1), gradient.mul_(form.divergence_weight), 0.0)
        if of_labels is None:
            raw.zero_()
        else:
            assert weight is not None
            raw.copy_(of_labels.mul_(weight))
            gradient += of_labels[:, : gradient.shape[-1]]
        raw[:, : gradient.shape[-1]] = gradient
    return torch.where(kept, value, 0.0), total
