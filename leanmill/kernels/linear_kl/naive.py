"""Divergences between next-token distributions in plain tensor code: whole, and a chunk at a time.

With teacher p and student q, both softmax(logits / T), and buckets that are tokens or, for a top-k
cache, the k tokens and all others together:

    forward          KL(p || q)
    reverse          KL(q || p)
    js               b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q
    skew_forward     KL(p || m),  m = b p + (1 - b) q
    skew_reverse     KL(q || m),  m = (1 - b) p + b q
    total_variation  sum |p - q| / 2
    blend            b KL(q || p) + (1 - b) KL(p || q)
    deviation        H^b KL(p || q),  H = -sum p log q counting as a constant

each times T^2. A bucket of no mass adds nothing to the sum that it weighs (0 log 0 = 0). And

    mse              the mean over the vocabulary of the squared difference of logits,

whose T^2 and T cancel, and which buckets do not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


Kind = Literal[
    "forward", "reverse", "js", "skew_forward", "skew_reverse", "total_variation", "blend", "mse", "deviation"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order by which kernels number them."""
HAS_BETA: frozenset[Kind] = frozenset({"js", "skew_forward", "skew_reverse", "blend", "deviation"})
IN_TENSORS: frozenset[Kind] = frozenset({"deviation"})
"""What has no code but `rows`."""
_MAX_NUM_COPIED = 1 << 22
"""Logits that `top_k_of` copies at once."""


@dataclass(frozen=True)
class Form:
    """The loss of a token: `divergence_weight` x T^2 x divergence + `cross_entropy_weight` x cross-entropy."""

    kind: Kind
    beta: float = 0.5
    temperature: float = 1.0
    divergence_weight: float = 1.0
    cross_entropy_weight: float | None = None
    """Cross-entropy is that of softmax(logits), without the temperature; None does not compute it."""

    @property
    def teacher_share(self) -> float:
        """Weight of p in the mixture m of the kinds that have one."""
        return 1 - self.beta if self.kind == "skew_reverse" else self.beta


def divergence(student_logits: Tensor, teacher_logits: Tensor, form: Form) -> Tensor:
    """Return T^2 x the divergence of each row of logits [..., V], fp32 (fp64 for fp64)."""
    if form.kind == "mse":
        exact = torch.promote_types(student_logits.dtype, torch.float32)
        return (student_logits.to(exact) - teacher_logits.to(exact)).square().mean(-1)
    log_q, log_p = (log_softmax(logits, form.temperature) for logits in (student_logits, teacher_logits))
    return form.temperature**2 * between(log_p, log_q, form)


def top_k_divergence(
    student_logits: Tensor, indices: Tensor, log_probs: Tensor, form: Form, log_tail: Tensor | None = None
) -> Tensor:
    """Return T^2 x the divergence over k + 1 buckets: the teacher's k tokens, and the rest as one.

    With k = V there is no rest: its bucket is empty for both, and this is `divergence`.

    Args:
        student_logits: [N, V].
        indices: Tokens of the teacher's largest probabilities, distinct in a row [N, k] int64.
        log_probs: Their log-probabilities under softmax(teacher logits / T) [N, k].
        form: Which divergence.
        log_tail: Log of the teacher's mass on all other tokens [N]; None finds it by `log_mass_left`.
    """
    log_q = log_softmax(student_logits, form.temperature)
    of_tail = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    buckets_q = torch.cat([log_q.gather(-1, indices), of_tail], -1)
    buckets_p = with_tail(log_probs, log_tail, log_q.shape[-1]).to(log_q.dtype)
    return form.temperature**2 * between(buckets_p, buckets_q, form)


def top_k_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a top-k cache keeps of logits [..., V]: indices, log-probabilities and tails, at least fp32.

    A few rows at a time: their copies are small beside the logits.
    """
    rows = logits.reshape(-1, logits.shape[-1]).split(max(1, _MAX_NUM_COPIED // logits.shape[-1]))
    indices, log_probs, tails = zip(*(_top_k_of_rows(some, k, temperature) for some in rows), strict=True)
    shape = logits.shape[:-1]
    return torch.cat(indices).view(*shape, k), torch.cat(log_probs).view(*shape, k), torch.cat(tails).view(shape)


def _top_k_of_rows(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(temperature)
    total = exact.logsumexp(-1, keepdim=True)
    largest, indices = exact.topk(k)
    of_tail = exact.scatter_(-1, indices, -torch.inf).logsumexp(-1)
    return indices, largest - total, of_tail - total.squeeze(-1)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T), at least fp32."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def with_tail(log_probs: Tensor, log_tail: Tensor | None, vocab_size: int) -> Tensor:
    """Append the log of the mass outside of the k largest log-probabilities [..., k], at least fp32."""
    wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    if log_probs.shape[-1] == vocab_size:
        tail = torch.full_like(wide[..., :1], -torch.inf)
    elif log_tail is None:
        tail = log_mass_left(log_probs, vocab_size)
    else:
        tail = log_tail.unsqueeze(-1)
    return torch.cat([wide, tail.to(wide.dtype)], -1)


def log_mass_left(log_probs: Tensor, vocab_size: int) -> Tensor:
    """Return log(1 - sum p) [..., 1] in fp64 of a row's k < V largest log-probabilities [..., k].

    1 - p of the largest is -expm1(log p), so a tail far below the spacing of numbers near 1 is found
    where the log-probability is that exact. Often it is not: in fp32, log softmax of a logit 20 above
    the rest is 0. Where no more is left than rounding explains, the tail is at most V - k times
    the smallest of the k; where nothing is left, it is the most that both allow. So a teacher that has
    a probability for every token never has an empty tail, of which a reverse divergence is infinite.
    """
    exact = log_probs.double()
    masses = exact.exp()
    largest, position = exact.max(-1, keepdim=True)
    left = -largest.expm1() - masses.scatter(-1, position, 0.0).sum(-1, keepdim=True)
    # Half a unit in the last place of each log-probability, and what their common divisor was off by.
    spread = torch.special.entr(masses).sum(-1, keepdim=True)
    computed_in = torch.promote_types(log_probs.dtype, torch.float32)
    rounding = torch.finfo(computed_in).eps + 0.5 * torch.finfo(log_probs.dtype).eps * spread
    most = exact.amin(-1, keepdim=True) + math.log(vocab_size - log_probs.shape[-1])
    found = torch.where(left > 0, left, rounding).log()
    return torch.where(left > rounding, found, torch.minimum(found, most))


def between(log_p: Tensor, log_q: Tensor, form: Form) -> Tensor:
    """Return the divergence of rows of log-probabilities, differentiable."""
    if form.kind == "forward":
        return _kl(log_p, log_q)
    if form.kind == "reverse":
        return _kl(log_q, log_p)
    if form.kind == "blend":
        return form.beta * _kl(log_q, log_p) + (1 - form.beta) * _kl(log_p, log_q)
    if form.kind == "deviation":
        return deviation_weight(_kl(log_p.detach(), log_q.detach()), log_p.exp(), form.beta) * _kl(log_p, log_q)
    if form.kind == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    mixture = _mixture(log_p, log_q, form.teacher_share)
    if form.kind == "skew_forward":
        return _kl(log_p, mixture)
    if form.kind == "skew_reverse":
        return _kl(log_q, mixture)
    return form.beta * _kl(log_p, mixture) + (1 - form.beta) * _kl(log_q, mixture)


def deviation_weight(divergence: Tensor, p: Tensor, exponent: float) -> Tensor:
    """Return H^exponent of rows, H = -sum p log q = KL(p || q) + H(p): how far from sure teacher and student are."""
    return (divergence + torch.special.entr(p.detach()).sum(-1)).clamp(min=0).pow(exponent)


def _mixture(log_p: Tensor, log_q: Tensor, teacher_share: float) -> Tensor:
    # A bucket empty for both has no part in any sum, and must not reach the gradient of this one.
    is_empty = (log_p == -torch.inf) & (log_q == -torch.inf)
    of_teacher, of_student = (torch.where(is_empty, 0.0, log_mass) for log_mass in (log_p, log_q))
    return torch.logaddexp(of_teacher + math.log(teacher_share), of_student + math.log1p(-teacher_share))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # The inner `where` keeps -inf - -inf out of the gradient, the outer one out of the value.
    is_empty = log_p == -torch.inf
    ratio = torch.where(is_empty, 0.0, log_p) - torch.where(is_empty, 0.0, log_q)
    return torch.where(is_empty, 0.0, log_p.exp() * ratio).sum(-1)
