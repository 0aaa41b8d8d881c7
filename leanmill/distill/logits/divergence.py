"""Divergences between a teacher's and a student's next-token distributions."""

from __future__ import annotations

from torch import Tensor

from leanmill.distill.logits.kinds import Kind
from leanmill.kernels.linear_kl import naive
from leanmill.kernels.linear_kl.op import TopK


KERNEL_KINDS: dict[Kind, naive.Kind] = {
    "forward_kl": "forward",
    "reverse_kl": "reverse",
    "js": "js",
    "skew_forward_kl": "skew_forward",
    "skew_reverse_kl": "skew_reverse",
    "total_variation": "total_variation",
    "mse": "mse",
    "cakld": "blend",
    "deviation_aware": "deviation",
}
"""What the kernels call them."""


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Kind,
    temperature: float = 1.0,
    beta: float = 0.5,
    top_k: int | None = None,
) -> Tensor:
    """Return T^2 x the divergence of each row, fp32 (fp64 for fp64 logits).

    With teacher p and student q, both softmax(logits / T):
    `forward_kl` is KL(p || q), `reverse_kl` is KL(q || p), and `js` is
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv:2306.13649, eq. 1).
    `skew_forward_kl` is KL(p || beta p + (1 - beta) q), `skew_reverse_kl` KL(q || (1 - beta) p + beta q)
    (arXiv:2402.03898, eq. 2 and 6), `total_variation` sum |p - q| / 2, `cakld` beta KL(q || p) + (1 - beta) KL(p || q)
    (arXiv:2402.10631, eq. 7), `deviation_aware` (-sum p log q)^beta KL(p || q), the factor a constant. `mse` is the
    mean over the vocabulary of the squared difference of logits, without T.

    Args:
        student_logits: [..., V], any float dtype.
        teacher_logits: [..., V], any float dtype.
        kind: Which divergence.
        temperature: T.
        beta: See above.
        top_k: Compare the teacher's k largest probabilities, and the rest of its mass as one more bucket.

    Returns:
        [...].
    """
    if top_k is not None:
        cache = TopK.of(teacher_logits, top_k, temperature)
        return cached_divergence(student_logits, cache, kind=kind, temperature=temperature, beta=beta)
    return naive.divergence(student_logits, teacher_logits, naive.Form(KERNEL_KINDS[kind], beta, temperature))


def cached_divergence(student_logits: Tensor, cache: TopK, *, kind: Kind, temperature: float, beta: float) -> Tensor:
    """Return the same [N] of logits [N, V] against a teacher's largest probabilities [N, k]; see `divergence`."""
    form = naive.Form(KERNEL_KINDS[kind], beta, temperature)
    return naive.top_k_divergence(student_logits, cache.indices, cache.log_probs, form, cache.log_tail)
