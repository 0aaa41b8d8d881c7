"""What decides where a token goes: its id, the token before it, or where it stands (Xue et al. 2024, arXiv:2402.01739).

All of it is measured out of sample: half of the rows say what to expect, the other half is held against it. Mutual
information of counts in one sample would call a router that draws at random predictable, since most ids are rare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmill.study.routed import Ids, Routed


NUM_POSITION_BUCKETS = 64
_PRIORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e6)
"""How many choices the experts' overall frequencies count beside those seen with a token."""


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """How far three things predict a layer's experts: 0 is no better than the experts' overall frequencies, 1 exact."""

    token: float
    previous_token: float
    position: float
    agreement: float
    """Share of tokens whose first expert is the one that was most frequent for their id in the other half."""
    agreement_by_chance: float
    """The same for the expert most frequent overall."""
    num_tokens: int
    """Held-out tokens that were looked at: their id and the one before it occur in the other half."""


def dependence(routed: Routed) -> Dependence | None:
    """Return what predicts the experts of a layer; None where too few tokens repeat to say so.

    A share explained is 1 - CE(expert | x) / CE(expert): cross-entropies on the odd rows of what the even rows
    say, p(e | x) = (n(x, e) + a p(e)) / (n(x) + a), with the a of a grid that predicts best.
    """
    previous = np.concatenate([np.full_like(routed.tokens[:, :1], -1), routed.tokens[:, :-1]], axis=1)
    fit, test = _halves(routed, previous)
    known = np.isin(test.tokens, fit.tokens) & np.isin(test.previous, fit.tokens)
    test = test.where(known)
    if not len(test.tokens):
        return None
    frequencies = np.bincount(fit.experts.ravel(), minlength=routed.num_experts + 1)[:-1]
    overall = (frequencies + 1e-9) / (frequencies + 1e-9).sum()
    explained = {
        name: _explained(getattr(fit, name), fit.experts, getattr(test, name), test.experts, overall)
        for name in ("tokens", "previous", "position")
    }
    return Dependence(
        token=explained["tokens"],
        previous_token=explained["previous"],
        position=explained["position"],
        agreement=_agreement(fit, test, routed.num_experts),
        agreement_by_chance=float((test.experts[:, 0] == np.argmax(_first(fit, routed.num_experts))).mean()),
        num_tokens=len(test.tokens),
    )


@dataclass(frozen=True)
class _Half:
    """Tokens in a row: id, the id before, bucket of the position, experts [N, K]."""

    tokens: Ids
    previous: Ids
    position: Ids
    experts: Ids

    def where(self, mask: NDArray[np.bool_]) -> _Half:
        return _Half(self.tokens[mask], self.previous[mask], self.position[mask], self.experts[mask])


def _halves(routed: Routed, previous: Ids) -> tuple[_Half, _Half]:
    """Even and odd rows; without padding, first tokens of a row, and tokens whose first choice was dropped."""
    num_rows, length = routed.tokens.shape
    buckets = np.broadcast_to(np.arange(length) * min(NUM_POSITION_BUCKETS, length) // length, (num_rows, length))
    use = routed.is_real & (previous >= 0) & (routed.experts[:, :, 0] < routed.num_experts)

    def half(first: int) -> _Half:
        rows = slice(first, None, 2)
        mask = use[rows]
        return _Half(*(part[rows][mask] for part in (routed.tokens, previous, buckets, routed.experts)))

    return half(0), half(1)


def _explained(fit_x: Ids, fit_experts: Ids, test_x: Ids, test_experts: Ids, overall: NDArray[np.float64]) -> float:
    """Return 1 - CE(expert | x) / CE(expert) over the choices of the test half that were not dropped."""
    num_experts, top_k = len(overall), fit_experts.shape[1]
    values = np.unique(np.concatenate([fit_x, test_x]))
    row_of, row = np.searchsorted(values, fit_x), np.searchsorted(values, test_x)
    cells = row_of[:, None] * (num_experts + 1) + fit_experts
    seen = np.bincount(cells.ravel(), minlength=len(values) * (num_experts + 1)).reshape(len(values), -1)[:, :-1]
    rows, chosen = np.repeat(row, top_k), test_experts.ravel()
    rows, chosen = rows[chosen < num_experts], chosen[chosen < num_experts]
    hits, totals, prior = seen[rows, chosen], seen.sum(1)[rows], overall[chosen]
    baseline = -np.log(prior).mean()
    best = min(-np.log((hits + a * prior) / (totals + a)).mean() for a in _PRIORS)
    return float(np.clip(1 - best / baseline, 0, 1)) if baseline > 1e-6 else 0.0


def _first(half: _Half, num_experts: int) -> Ids:
    return np.bincount(half.experts[:, 0], minlength=num_experts)


def _agreement(fit: _Half, test: _Half, num_experts: int) -> float:
    ids, row = np.unique(fit.tokens, return_inverse=True)
    seen = np.bincount(row * num_experts + fit.experts[:, 0], minlength=len(ids) * num_experts)
    favourite = seen.reshape(len(ids), num_experts).argmax(1)
    return float((favourite[np.searchsorted(ids, test.tokens)] == test.experts[:, 0]).mean())
