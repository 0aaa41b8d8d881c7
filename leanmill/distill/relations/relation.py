"""Relations between tokens, and how far a student's are from a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def documents_of(position_ids: Tensor) -> Tensor:
    """Return a number a token [B, S], the same within a document, from positions that restart in each."""
    return (position_ids == 0).cumsum(-1)


def relation_divergence(
    student: Tensor, teacher: Tensor, documents: Tensor, num_heads: int, first: int, last: int
) -> Tensor:
    """Return KL(teacher's relations || student's) of some tokens, the mean over heads, fp32.

    A vector a token is cut into heads of d entries, and the relation of token i to the tokens up to it in its
    document is softmax(a_i A^T / sqrt d) (arXiv:2012.15828, eq. 5 to 7; there every token is related to all).

    Args:
        student: [B, S, W], any float dtype; `num_heads` divides W.
        teacher: [B, S, V], any float dtype, without gradients; `num_heads` divides V.
        documents: [B, S], see `documents_of`.
        num_heads: Relation heads.
        first: First token i.
        last: One past the last.

    Returns:
        [B, last - first].
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    related = documents[:, first:last, None] == documents[:, None]
    related = (related & (index[first:last, None] >= index)).unsqueeze(1)
    with torch.autocast(student.device.type, enabled=False):
        log_q = _relations(student, related, num_heads, first, last)
        log_p = _relations(teacher, related, num_heads, first, last)
        gap = torch.where(related, log_p - log_q, 0.0)
        return (log_p.exp() * gap).sum(-1).mean(1)


def _relations(vectors: Tensor, related: Tensor, num_heads: int, first: int, last: int) -> Tensor:
    """Return log-relations [B, heads, last - first, S]; very low where there is none."""
    heads = vectors.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = heads[:, :, first:last] @ heads.transpose(-1, -2) / heads.shape[-1] ** 0.5
    # A finite number: with -inf the gradient of what `where` leaves out would be NaN.
    return scores.masked_fill(~related, torch.finfo(torch.float32).min / 2).log_softmax(-1)
