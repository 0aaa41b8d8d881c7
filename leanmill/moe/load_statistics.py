"""What the loads of experts say: how even they are, and how much domains differ in them. Plain arrays, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def max_violation(loads: ArrayLike) -> float:
    """Return MaxVio, the largest load over the mean load, less 1: 0 for equal loads (Wang et al. 2024, 2408.15664).

    Args:
        loads: [E] numbers of tokens, of one layer. Without any tokens it is 0.
    """
    values = np.asarray(loads, dtype=np.float64)
    mean = values.mean()
    return float(values.max() / mean - 1) if mean > 0 else 0.0


def load_entropy(loads: ArrayLike) -> float:
    """Return the entropy of the loads [E] over that of equal ones: 1 for equal loads, 0 where one expert has all.

    One expert, or no tokens, has nothing to be uneven: 1.
    """
    shares = _shares(np.asarray(loads, dtype=np.float64))
    return 1.0 if shares is None or len(shares) == 1 else _entropy(shares) / float(np.log(len(shares)))


def num_dead(loads: ArrayLike) -> int:
    """Return how many experts of the loads [E] got no token."""
    return int((np.asarray(loads) == 0).sum())


def specialisation(counts: Mapping[str, ArrayLike]) -> float | None:
    """Return how much domains differ in the experts they use: 0 all alike, 1 no expert is used by two of them.

    With p_d the distribution of domain d's tokens over experts and D domains, each counting the same:

        JSD = H(mean_d p_d) - mean_d H(p_d),    specialisation = JSD / ln D

    the generalised Jensen-Shannon divergence (Lin 1991). It is also I(expert; domain) / H(domain) for a token drawn
    from a domain drawn at random: the share of a token's domain that its expert gives away.

    Args:
        counts: By domain, [E] tokens sent to each expert of one layer. A domain without tokens is left out.

    Returns:
        None with fewer than two domains that have tokens.
    """
    found = [_shares(np.asarray(one, dtype=np.float64)) for one in counts.values()]
    shares = [one for one in found if one is not None]
    if len(shares) < 2:
        return None
    divergence = _entropy(np.mean(shares, axis=0)) - float(np.mean([_entropy(one) for one in shares]))
    return max(0.0, divergence) / float(np.log(len(shares)))


def silent_domains(counts: Mapping[str, Sequence[Sequence[Any]]]) -> list[str]:
    """Return the domains of which no layer has counted a token."""
    return [name for name, layers in counts.items() if not any(sum(layer) for layer in layers)]


def _shares(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    total = values.sum()
    return values / total if total > 0 else None


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
