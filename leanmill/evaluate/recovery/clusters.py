"""Documents in groups of like meaning: components of a diffusion kernel, and a factorisation of their products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


_AT_ONCE = 4096
"""Documents that are compared pair by pair; the others go where the mean of a group is nearest."""
_ITERATIONS = 200
"""Of the factorisation, which moves little after that."""
_Floats = NDArray[np.float64]


def clusters_of(embeddings: _Floats, num_clusters: int, *, seed: int) -> NDArray[np.int64]:
    """Return the group of each document [D], from 0; some groups may be empty.

    Args:
        embeddings: [D, n].
        num_clusters: At most.
        seed: Of the sample and of how the factorisation begins.
    """
    rng = np.random.default_rng(seed)
    number = min(num_clusters, len(embeddings))
    if len(embeddings) <= _AT_ONCE:
        return _grouped(embeddings, number, rng)
    sample = np.sort(rng.choice(len(embeddings), _AT_ONCE, replace=False))
    groups = _grouped(embeddings[sample], number, rng)
    there = np.unique(groups)
    means = np.stack([embeddings[sample][groups == group].mean(0) for group in there])
    nearest: NDArray[np.int64] = there[_squared_distances(embeddings, means).argmin(1)]
    return nearest


def _grouped(embeddings: _Floats, number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    components = diffusion_components(embeddings, number)
    found: NDArray[np.int64] = factorised(np.abs(components @ components.T), number, rng)[0].argmax(1)
    return found


def diffusion_components(embeddings: _Floats, number: int) -> _Floats:
    """Return the eigenvectors of I - D^-1 A of the least eigenvalues [D, number], each of unit length.

    A_ij = exp(-||e_i - e_j||^2 / (2 sigma^2)) with sigma the median of all distances, D its row sums. Found by the
    symmetric I - D^-1/2 A D^-1/2, whose eigenvectors are theirs times D^1/2.

    Args:
        embeddings: [D, n].
        number: At most D.
    """
    squared = _squared_distances(embeddings, embeddings)
    sigma = float(np.median(np.sqrt(squared))) or 1.0
    affinity = np.exp(-squared / (2 * sigma**2))
    roots = np.sqrt(affinity.sum(1))
    _, vectors = np.linalg.eigh(np.eye(len(affinity)) - affinity / np.outer(roots, roots))
    found: _Floats = vectors[:, :number] / roots[:, None]
    return found / np.linalg.norm(found, axis=0)  # type: ignore[no-any-return]


def factorised(products: _Floats, number: int, rng: np.random.Generator) -> tuple[_Floats, _Floats]:
    """Return W [D, number] and H [number, D] of no negative numbers, whose product is near `products` [D, D].

    Multiplicative updates of the squared error (Lee and Seung 2001, "Algorithms for Non-negative Matrix
    Factorization").
    """
    tiny = np.finfo(np.float64).tiny
    scale = np.sqrt(products.mean() / number)
    left, right = (scale * (0.1 + rng.random(shape)) for shape in ((len(products), number), (number, len(products))))
    for _ in range(_ITERATIONS):
        right *= (left.T @ products) / np.maximum(left.T @ left @ right, tiny)
        left *= (products @ right.T) / np.maximum(left @ (right @ right.T), tiny)
    return left, right


def _squared_distances(left: _Floats, right: _Floats) -> _Floats:
    norms = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return np.maximum(norms, 0)
