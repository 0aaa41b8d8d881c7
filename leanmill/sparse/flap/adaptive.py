"""FLAP with budgets that layers and their halves share out themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from leanmill.core.surgery import CalibratedModel, StoredBlock
from leanmill.sparse.flap.fluctuation import BIASES, fluctuation, replaced, with_biases
from leanmill.sparse.structured.cut import highest, rows_of_heads
from leanmill.sparse.structured.importance import HEADS, NEURONS, Moments
from leanmill.sparse.structured.uneven import Chosen, UnevenSurgeon, evenly, query_heads_of
from leanmill.sparse.structured.widths import Widths, config_with


class AdaptiveFlapSurgeon(UnevenSurgeon):
    """Cuts what fluctuates least by its layer's standard, wherever that is; see `Flap`.

    Args:
        sparsity: Share of the parameters of heads and neurons that goes.
    """

    technique: ClassVar[str] = "flap"

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.means: dict[tuple[int, str], Tensor] = {}
        """Of what enters an output or down projection [in], by layer and name."""

    def expected(self) -> Widths:
        neurons = evenly(self.widths.neurons, 1 - self.sparsity)
        return Widths(heads=self.widths.heads, groups=self.widths.groups, neurons=neurons)

    def config(self, before: Any) -> Any:
        super().config(before)
        # Whatever is cut, biases come, and so the family that has them.
        return _biased(config_with(self.technique, before, self.expected(), range(self.sizes.layers), own=True))

    def take(self, chosen: Chosen) -> Any:
        super().take(chosen)
        layers = range(self.sizes.layers)
        self.after = _biased(config_with(self.technique, self.before, chosen.widths, layers, own=True))
        return self.after

    def choose(self, model: CalibratedModel) -> Chosen:
        moments = Moments()
        heads: list[Tensor] = []
        neurons: list[Tensor] = []
        for block in model.blocks():
            has = {HEADS: self.widths.heads[block.index] > 0, NEURONS: self.widths.neurons[block.index] > 0}
            parts = [part for part, is_there in has.items() if is_there]
            with moments.watch(block, parts):
                for _ in block.run():
                    pass
            of_parts = {HEADS: torch.zeros(0), NEURONS: torch.zeros(0)}
            for part in parts:
                weight = block.module.get_parameter(f"{part}.weight").detach().double().cpu()
                mean, variance = moments.mean_and_variance(model, block.index, part)
                self.means[block.index, part] = mean
                of_parts[part] = standardised(fluctuation(variance, weight))
            number = self.widths.groups[block.index]
            heads.append(of_parts[HEADS].view(number, -1).mean(1) if number else of_parts[HEADS])
            neurons.append(of_parts[NEURONS])
        return self._chosen(heads, neurons)

    def _chosen(self, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Chosen:
        shared = [q // max(1, k) for q, k in zip(self.widths.heads, self.widths.groups, strict=True)]
        sizes = [float(self.sizes.head_dim * (2 * number + 2) * self.sizes.hidden) for number in shared]
        costs = [*sizes, *([3.0 * self.sizes.hidden] * len(neurons))]
        threshold = threshold_of([*heads, *neurons], costs, 1 - self.sparsity)
        groups = [_kept(scores, threshold) for scores in heads]
        return Chosen(
            heads=[query_heads_of(index, number) for index, number in zip(groups, shared, strict=True)],
            groups=groups,
            neurons=[_kept(scores, threshold) for scores in neurons],
        )

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        kept = {
            HEADS: rows_of_heads(self.chosen.heads[block.index], self.sizes.head_dim),
            NEURONS: self.chosen.neurons[block.index],
        }
        biases = {
            part: replaced(block.read(f"{part}.weight").double(), self.means[block.index, part], kept[part])
            for part in BIASES
            if (block.index, part) in self.means
        }
        return with_biases(super().block(block), block.names, biases)


def standardised(scores: Tensor) -> Tensor:
    """Return scores [n] less their mean, over their standard deviation."""
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(scores.dtype).tiny)


def threshold_of(scores: Sequence[Tensor], costs: Sequence[float], share: float) -> float:
    """Return the score above or at which structures stay, such that what they cost is nearest to a share of all.

    Args:
        scores: Of the structures of each half of each layer.
        costs: Parameters of one structure of each of them.
        share: Of the parameters of all.
    """
    every = torch.cat(list(scores))
    each = torch.cat(
        [torch.full((len(of),), cost, dtype=torch.float64) for of, cost in zip(scores, costs, strict=True)]
    )
    order = every.argsort(descending=True, stable=True)
    total = each[order].cumsum(0)
    return float(every[order[int((total - share * total[-1]).abs().argmin())]])


def _kept(scores: Tensor, threshold: float) -> Tensor:
    """Indices of what stays: one at least, since a half that is gone has no bias."""
    number = int((scores >= threshold).sum())
    return highest(scores, max(number, 1) if len(scores) else 0)


def _biased(after: Any) -> Any:
    for setting, _ in BIASES.values():
        setattr(after, setting, True)
    return after
