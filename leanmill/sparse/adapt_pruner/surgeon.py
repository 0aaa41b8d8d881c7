"""Adapt-Pruner's budgets, and which heads and neurons they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.surgery import CalibratedModel
from leanmill.sparse.structured.budgets import shared_out
from leanmill.sparse.structured.cut import highest
from leanmill.sparse.structured.importance import influence, taylor_of_parts
from leanmill.sparse.structured.uneven import Chosen, UnevenSurgeon, evenly, everything, query_heads_of
from leanmill.sparse.structured.widths import Widths


class AdaptPrunerSurgeon(UnevenSurgeon):
    """Cuts key-value heads with their query heads, and neurons; see `AdaptPruner` for the arguments."""

    technique: ClassVar[str] = "adapt_pruner"

    def __init__(
        self, *, sparsity: float, amplitude: float, cuts_heads: bool, cuts_neurons: bool, multiple_of: int
    ) -> None:
        super().__init__()
        self.sparsity, self.amplitude, self.multiple_of = sparsity, amplitude, multiple_of
        self.cuts_heads, self.cuts_neurons = cuts_heads, cuts_neurons

    def expected(self) -> Widths:
        found = self.widths
        if self.cuts_neurons:
            found = replace(found, neurons=evenly(found.neurons, 1 - self.sparsity, self.multiple_of))
        return found

    def choose(self, model: CalibratedModel) -> Chosen:
        influences = torch.zeros(self.sizes.layers, dtype=torch.float64)
        for block in model.blocks():
            for before, after in block.run():
                influences[block.index] += influence(before, after)
        influences = model.total(influences)
        if not torch.isfinite(influences).all():
            raise RunError("adapt_pruner: layers put out what is not finite on the calibration rows; look at the data")
        shares = sparsities(influences.tolist(), self.sparsity, self.amplitude)
        scores = taylor_of_parts(model, self.widths.groups)
        found = everything(self.widths)
        if self.cuts_neurons:
            kept = self._best([of.neurons for of in scores], self.widths.neurons, shares, self.multiple_of)
            found = replace(found, neurons=kept)
        if self.cuts_heads:
            groups = self._best([of.groups for of in scores], self.widths.groups, shares, 1)
            shared = [q // max(1, k) for q, k in zip(self.widths.heads, self.widths.groups, strict=True)]
            heads = [query_heads_of(index, number) for index, number in zip(groups, shared, strict=True)]
            found = replace(found, groups=groups, heads=heads)
        return found

    def _best(
        self, scores: Sequence[Tensor], there: Sequence[int], shares: Sequence[float], multiple_of: int
    ) -> list[Tensor]:
        wanted = [number * (1 - share) for number, share in zip(there, shares, strict=True)]
        total = round(sum(there) * (1 - self.sparsity))
        numbers = shared_out(wanted, there, total, multiple_of=multiple_of)
        return [highest(score, number) for score, number in zip(scores, numbers, strict=True)]


def sparsities(influences: Sequence[float], sparsity: float, amplitude: float) -> list[float]:
    """Return the share of each layer that goes: the mean one less amplitude times importance, within 0 and 0.99.

    Importance is 1 - cos(input, output) less its mean over layers, by its largest magnitude.

    Args:
        influences: Of each layer, the sum or mean over tokens of 1 - cos(input, output).
        sparsity: Mean share.
        amplitude: See `AdaptPruner`.
    """
    mean = sum(influences) / len(influences)
    largest = max(abs(value - mean) for value in influences) or 1.0
    return [min(0.99, max(0.0, sparsity - amplitude * (value - mean) / largest)) for value in influences]
