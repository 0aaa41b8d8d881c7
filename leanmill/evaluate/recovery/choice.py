"""The choice: each group of documents has a share of the budget, for those on which most was lost for their cost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmill.evaluate.recovery.clusters import clusters_of
from leanmill.evaluate.recovery.concepts import ConceptGraph


@dataclass(frozen=True, kw_only=True)
class Features:
    """What two models make of documents."""

    embeddings: NDArray[np.float64]
    """[D, n]: what each is about."""
    degradation: NDArray[np.float64]
    """[D]: mean over the tokens to learn of the Jensen-Shannon divergence between the model before pruning and after,
    nats; NaN where there is no such token."""
    lengths: NDArray[np.int64]
    """[D]: tokens."""


def efficiency(degradation: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what training on a document is worth [D]: degradation over the logarithm of its cost, length squared."""
    return degradation / np.log(np.maximum(lengths, 2).astype(np.float64) ** 2)


def shares_of(degradation: NDArray[np.float64], groups: NDArray[np.int64], budget: int) -> dict[int, int]:
    """Return how many documents of each group are taken: floor(budget x its mean degradation / the sum of means)."""
    means = {int(group): float(degradation[groups == group].mean()) for group in np.unique(groups)}
    total = sum(means.values())
    return {group: int(budget * mean / total) if total else 0 for group, mean in means.items()}


def chosen_documents(
    features: Features, concepts: Callable[[int], Collection[str]], *, budget: int, num_clusters: int, seed: int
) -> NDArray[np.int64]:
    """Return the numbers of the documents to train on, ascending; fewer than the budget where groups run out.

    Groups in turn, each from its most efficient document on; one of whose concepts two are known of documents that were
    taken, but not of one and the same, is passed over.

    Args:
        features: Of all documents.
        concepts: Returns what a document is about, by its number.
        budget: How many at most.
        num_clusters: Groups, at most.
        seed: Of the groups.
    """
    known = np.flatnonzero(np.isfinite(features.degradation))
    if not len(known):
        return known
    degradation = features.degradation[known]
    groups = clusters_of(features.embeddings[known], num_clusters, seed=seed)
    worth = efficiency(degradation, features.lengths[known])
    graph, found = ConceptGraph(), []
    for group, number in shares_of(degradation, groups, budget).items():
        members = np.flatnonzero(groups == group)
        left = number
        for member in members[np.argsort(-worth[members], kind="stable")].tolist():
            if not left:
                break
            about = concepts(int(known[member]))
            if graph.is_consistent(about):
                graph.add(about)
                found.append(int(known[member]))
                left -= 1
    return np.sort(np.asarray(found, dtype=np.int64))
