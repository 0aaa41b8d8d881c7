"""Divergence of a chunk of logits and its gradient written over them, in tensor code.

With h the derivative of the divergence by a bucket's student mass q, the gradient by a logit is
T (q h - q sum of q h), to which what h has the same for all buckets adds nothing; see naive.py for the
divergences. q h is called the slope.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanmill.kernels.linear_cross_entropy import naive as cross_entropy
from leanmill.kernels.linear_kl.naive import Form, deviation_weight, log_softmax, with_tail


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
    if form.kind == "mse":
        exact = torch.promote_types(raw.dtype, torch.float32)
        apart = raw[:, :shared].to(exact) - teacher[:, :shared].to(exact)
        return _finish(raw, apart.square().mean(-1), apart.mul_(2 / shared), labels, form, wants_gradient)
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
    value, gradient = _of_buckets(log_p, torch.cat([of_taken, of_tail], -1), form)
    # The tail's gradient is shared out by mass; a tail without mass has none to share.
    share = others.sub_(torch.where(of_tail == -torch.inf, 0.0, of_tail)).exp_()
    spread = share.mul_(gradient[:, -1:]).scatter_(-1, indices, gradient[:, :-1])
    return _finish(raw, value, spread, labels, form, wants_gradient)


def _of_buckets(log_p: Tensor, log_q: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return T^2 x divergence of rows, and its gradient by logits of the buckets; overwrites both.

    Student's masses add up to 1; a teacher's need not, if they are a rounded cache.
    """
    gap = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    value, slope = _value_and_slope(p, q, gap, form)
    slope = slope.sub_(q.mul_(slope.sum(-1, keepdim=True)))
    return value * form.temperature**2, slope.mul_(form.temperature)


def _value_and_slope(p: Tensor, q: Tensor, gap: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return the divergence [n] and the slopes [n, buckets], new; `gap` is log(p / q) and is overwritten."""
    beta, kind = form.beta, form.kind
    if kind == "forward":
        return _sum(p, gap), -p
    if kind == "deviation":
        forward = _sum(p, gap)
        weight = deviation_weight(forward, p, beta)
        return weight * forward, -p * weight.unsqueeze(-1)
    if kind == "reverse":
        slope = _times(q, gap).neg_()
        return slope.sum(-1), slope
    if kind == "blend":
        reverse = _times(q, gap).mul_(-beta)
        return reverse.sum(-1) + (1 - beta) * _sum(p, gap), reverse.sub_(p, alpha=1 - beta)
    if kind == "total_variation":
        excess = q - p
        return 0.5 * excess.abs().sum(-1), excess.sign_().mul_(q).mul_(0.5)
    over_teacher, over_student = _over_parts(gap, form.teacher_share)
    if kind == "skew_forward":
        return -_sum(p, over_teacher), _times(q, over_teacher.neg().exp_()).mul_(beta - 1)
    if kind == "skew_reverse":
        slope = _times(q, over_student).neg_()
        return slope.sum(-1), slope.sub_(_times(q, over_student.neg().exp_()), alpha=beta)
    slope = _times(q, over_student).mul_(beta - 1)
    return slope.sum(-1) - beta * _sum(p, over_teacher), slope


def _over_parts(gap: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return log(m / p) and log(m / q) of the mixture m, from log(p / q); an infinite gap keeps the first finite."""
    log_share, log_rest = math.log(share), math.log1p(-share)
    smaller_adds = (gap + (log_share - log_rest)).abs_().neg_().exp_().log1p_()
    over_teacher = (log_rest - gap).clamp_(min=log_share).add_(smaller_adds)
    return over_teacher, smaller_adds.add_((gap + log_share).clamp_(min=log_rest))


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
