"""Which singular values of a model's weights go, by one threshold for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def normalised(values: Tensor) -> Tensor:
    """Return singular values [n] from 0 for the least to 1 for the largest; all 1 where they are equal."""
    least, largest = values.min(), values.max()
    return (values - least) / (largest - least) if largest > least else torch.ones_like(values)


def threshold_for(spectra: Sequence[Tensor], reduction: float) -> float:
    """Return the least threshold below which that share of all values lies, or the next larger share there is.

    Args:
        spectra: Normalised singular values of each weight.
        reduction: Share, above 0 and below 1.
    """
    values = torch.cat(list(spectra)).sort().values
    wanted = int(torch.tensor(reduction * len(values), dtype=torch.float64).round())
    # Values below, so the threshold is the first one that stays.
    return float(values[min(max(wanted, 0), len(values) - 1)])


def pair_ranks(spectra: Mapping[str, Tensor], reduction: float, least_reduction: float) -> dict[str, int]:
    """Return the rank of each weight that becomes a pair, 0 of one that stays whole.

    Args:
        spectra: Singular values of each weight, by name.
        reduction: Share of all of them that goes.
        least_reduction: Share of its own above which a weight becomes a pair.
    """
    scaled = {name: normalised(values) for name, values in spectra.items()}
    threshold = threshold_for(list(scaled.values()), reduction)
    ranks = {}
    for name, values in scaled.items():
        gone = int((values < threshold).sum())
        ranks[name] = len(values) - gone if gone > least_reduction * len(values) else 0
    return ranks
