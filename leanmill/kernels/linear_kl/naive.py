"""Divergences between next-token distributions in plain tensor code: whole, and a chunk at a time.

With teacher p and student q, both softmax(logits / T), and buckets that are tokens or, for a top-k
cache, the k tokens and all others together:

    forward  KL(p || q)
    reverse  KL(q || p)
    js       b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q

each times T^2. A bucket of no mass adds nothing to the sum that it weighs (0 log 0 = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


Kind = Literal["forward", "reverse", "js"]


@dataclass(frozen=True)
class Form:
    """The loss of a token: `divergence_weight` x T^2 x divergence + `cross_entropy_weight` x cross-entropy."""

    kind: Kind
    beta: float = 0.5
    temperature: float = 1.0
    divergence_weight: float = 1.0
    cross_entropy_weight: float | None = None
    """Cross-entropy is that of softmax(logits), without the temperature; None does not compute it."""


def divergence(student_logits: Tensor, teacher_logits: Tensor, form: Form) -> Tensor:
    """Return T^2 x the divergence of each row of logits [..., V], fp32 (fp64 for fp64)."""
    log_q, log_p = (log_softmax(logits, form.temperature) for logits in (student_logits, teacher_logits))
    return form.temperature**2 * between(log_p, log_q, form)


def top_k_divergence(student_logits: Tensor, indices: Tensor, log_probs: Tensor, form: Form) -> Tensor:
    """Return T^2 x the divergence over k + 1 buckets: the teacher's k tokens, and the rest as one.

    Args:
        student_logits: [N, V].
        indices: Tokens of the teacher's largest probabilities, distinct in a row [N, k] int64.
        log_probs: Their log-probabilities under softmax(teacher logits / T) [N, k].
        form: Which divergence.
    """
    log_q = log_softmax(student_logits, form.temperature)
    taken = torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, indices, True)
    tail = log_q.masked_fill(taken, -torch.inf).logsumexp(-1, keepdim=True)
    buckets_q = torch.cat([log_q.gather(-1, indices), tail], -1)
    return form.temperature**2 * between(with_tail(log_probs.to(log_q.dtype)), buckets_q, form)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T), at least fp32."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def with_tail(log_probs: Tensor) -> Tensor:
    """Append the log of the mass that the given log-probabilities [..., k] leave."""
    mass = log_probs.exp().sum(-1, keepdim=True).clamp(max=1)
    return torch.cat([log_probs, (1 - mass).log()], -1)


def between(log_p: Tensor, log_q: Tensor, form: Form) -> Tensor:
    """Return the divergence of rows of log-probabilities, differentiable."""
    if form.kind == "forward":
        return _kl(log_p, log_q)
    if form.kind == "reverse":
        return _kl(log_q, log_p)
    mixture = torch.logaddexp(log_p + math.log(form.beta), log_q + math.log1p(-form.beta))
    return form.beta * _kl(log_p, mixture) + (1 - form.beta) * _kl(log_q, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # The inner `where` keeps -inf - -inf out of the gradient, the outer one out of the value.
    is_empty = log_p == -torch.inf
    ratio = torch.where(is_empty, 0.0, log_p) - torch.where(is_empty, 0.0, log_q)
    return torch.where(is_empty, 0.0, log_p.exp() * ratio).sum(-1)
