"""Distances between hidden states."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


Kind = Literal["mse", "cosine", "normalised_mse"]


def distance(student: Tensor, teacher: Tensor, kind: Kind) -> Tensor:
    """Return the distance of each vector in the last dim, fp32.

    With s and t of width H: `mse` is |s - t|^2 / H (arXiv:1909.10351), `cosine` is 1 - cos(s, t)
    (arXiv:1910.01108), `normalised_mse` is |s - t|^2 / |t|^2. The last is taken a token at a time, so that
    the few tokens whose states are hundreds of times longer than others' do not decide it alone.

    Args:
        student: [..., H], any float dtype.
        teacher: [..., H], any float dtype, without gradients.
        kind: Which.

    Returns:
        [...].
    """
    student, teacher = student.float(), teacher.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    squared = (student - teacher).square()
    if kind == "mse":
        return squared.mean(-1)
    return squared.sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
