"""Divergences between a teacher's and a student's next-token distributions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from leanmill.kernels.linear_kl import naive


Kind = Literal["forward_kl", "reverse_kl", "js"]
KERNEL_KINDS: dict[Kind, naive.Kind] = {"forward_kl": "forward", "reverse_kl": "reverse", "js": "js"}
"""What the kernels call them."""


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
    return naive.divergence(student_logits, teacher_logits, naive.Form(KERNEL_KINDS[kind], beta, temperature))
