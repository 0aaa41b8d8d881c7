"""The contrastive loss over vectors that several ranks and micro-batches hold, one part at a time.

With queries q, keys k and temperature t, the loss of query i is -log softmax_j(cos(q_i, k_j) / t) at its own key. Each
part of the keys is also the negative of everybody else's queries. So the gradient of the sum over all queries of all
ranks, with respect to one part's vectors, has two terms: that of its own queries, and, through its keys, that of all
others'. Given every query's log-sum-exp both are had from vectors without gradients, and no collective runs in
backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Side:
    """Queries and keys of some rows, of length 1, fp32."""

    queries: Tensor
    """[n, H]."""
    keys: Tensor
    """[n x m, H]: of each row the key that belongs to its query, then m - 1 others."""
    is_query: Tensor
    """bool [n]: whether the row counts."""
    is_key: Tensor
    """bool [n x m]."""
    key_texts: Tensor
    """int64 [n x m]: hash of each key's text."""

    @property
    def keys_a_row(self) -> int:
        """M."""
        return self.keys.shape[0] // self.queries.shape[0]

    def own_keys(self) -> Tensor:
        """Return where each query's own key is, [n] int64."""
        return torch.arange(len(self.queries), device=self.queries.device) * self.keys_a_row


def logits(queries: Tensor, keys: Tensor, pool: Side, own: Tensor, temperature: float, columns: slice) -> Tensor:
    """Return cosines / temperature of queries [n, H] and keys [c, H], -inf where a key is no negative.

    That is where it is not there, or has the same text as the query's own key without being it.

    Args:
        queries: Some of the pool's, or vectors in their place.
        keys: Those of the pool in `columns`, or vectors in their place.
        pool: What the loss is over.
        own: [n], where in the pool each query's own key is.
        temperature: See above.
        columns: Of the pool's keys.
    """
    texts = pool.key_texts[columns]
    places = torch.arange(len(pool.keys), device=keys.device)[columns]
    is_twin = (texts == pool.key_texts[own][:, None]) & (places != own[:, None])
    return (queries @ keys.T / temperature).masked_fill(is_twin | ~pool.is_key[columns], -torch.inf)


@torch.no_grad()
def normalisers(part: Side, pool: Side, first_row: int, temperature: float) -> Tensor:
    """Return the log-sum-exp over the pool's keys of each query of the part that begins at `first_row`, fp32 [n]."""
    own = part.own_keys() + first_row * part.keys_a_row
    return logits(part.queries, pool.keys, pool, own, temperature, slice(None)).logsumexp(-1)


def part_of_loss(part: Side, pool: Side, first_row: int, log_sums: Tensor, temperature: float) -> Tensor:
    """Return the sum of the losses of one part's queries; its gradient is that of the whole pool's sum.

    Args:
        part: Rows `first_row` and following of the pool, with gradients.
        pool: All rows, without gradients.
        first_row: Where the part is.
        log_sums: [N], `normalisers` of all queries of the pool.
        temperature: See above.
    """
    count, per_row = len(part.queries), part.keys_a_row
    mine = slice(first_row * per_row, (first_row + count) * per_row)
    keys = torch.cat([pool.keys[: mine.start], part.keys, pool.keys[mine.stop :]])
    own = part.own_keys() + mine.start
    scores = logits(part.queries, keys, pool, own, temperature, slice(None))
    losses = scores.logsumexp(-1) - scores.gather(1, own[:, None])[:, 0]
    total = torch.where(part.is_query, losses, 0.0).sum()
    # Queries of others, told from this part's keys: softmax x score has the gradient of their log-sum-exp.
    others = pool.is_query.clone()
    others[first_row : first_row + count] = False
    cross = logits(pool.queries, part.keys, pool, pool.own_keys(), temperature, mine)
    share = (cross.detach() - log_sums[:, None]).exp()
    through_keys = torch.where(others[:, None] & (share > 0), share * cross.masked_fill(share == 0, 0.0), 0.0).sum()
    return total + through_keys - through_keys.detach()


def unit(vectors: Tensor) -> Tensor:
    """Return vectors [..., H] at length 1, fp32."""
    return F.normalize(vectors.float(), dim=-1)
