"""Divergences between a teacher's and a student's next-token distributions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


Kind = Literal["forward_kl", "reverse_kl", "js"]


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, kind: Kind, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Return T^2 x the divergence of each row, fp32 (fp64 for fp64 logits).

    With teacher p and student q, both softmax(logits / T):
    `forward_kl` is KL(p || q), `reverse_kl` is KL(q || p), and `js` is
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv:2306.13649, eq. 1).

    Args:
        student_logits: [..., V], any float dtype.
        teacher_logits: [..., V], any float dtype.
        kind: Which divergence.
        temperature: T.
        beta: Weight of the teacher in `js`.

    Returns:
        [...].
    """
    student, teacher = (_log_softmax(logits, temperature) for logits in (student_logits, teacher_logits))
    if kind == "forward_kl":
        value = _kl(teacher, student)
    elif kind == "reverse_kl":
        value = _kl(student, teacher)
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        value = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return temperature**2 * value


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(dtype) / temperature).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dim."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
