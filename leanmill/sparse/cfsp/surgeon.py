"""CFSP's budgets and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import RunError
from leanmill.core.surgery import CalibratedModel
from leanmill.sparse.structured.budgets import shared_out
from leanmill.sparse.structured.cut import highest
from leanmill.sparse.structured.importance import NEURONS, Moments
from leanmill.sparse.structured.uneven import Chosen, UnevenSurgeon, evenly, everything
from leanmill.sparse.structured.widths import Widths


_HEADROOM = 1.05
"""By how much the largest budget stays below all neurons, once it would exceed them."""


class CfspSurgeon(UnevenSurgeon):
    """Cuts neurons; see `Cfsp` for the arguments."""

    technique: ClassVar[str] = "cfsp"

    def __init__(self, *, sparsity: float, steepness: float, multiple_of: int) -> None:
        super().__init__()
        self.sparsity, self.steepness, self.multiple_of = sparsity, steepness, multiple_of

    def expected(self) -> Widths:
        return replace(self.widths, neurons=evenly(self.widths.neurons, 1 - self.sparsity, self.multiple_of))

    def choose(self, model: CalibratedModel) -> Chosen:
        angles, scores = torch.zeros(self.sizes.layers, 2, dtype=torch.float64), []
        moments = Moments()
        for block in model.blocks():
            names = [NEURONS] if self.widths.neurons[block.index] else []
            with moments.watch(block, names):
                for before, after in block.run():
                    angles[block.index] += torch.tensor([float(angle_between(before, after)), before[..., 0].numel()])
            if names:
                mean, variance = moments.mean_and_variance(model, block.index, NEURONS)
                weights = [
                    block.module.get_parameter(f"mlp.{name}.weight").detach().double().cpu()
                    for name in ("gate_proj", "up_proj", "down_proj")
                ]
                scores.append(neuron_scores((variance + mean.square()).sqrt(), *weights))
            else:
                scores.append(torch.zeros(0))
        angle, tokens = model.total(angles).unbind(1)
        if not torch.isfinite(angle).all():
            raise RunError("cfsp: blocks put out what is not finite on the calibration rows; look at model and data")
        return self._kept((angle / tokens).tolist(), scores)

    def _kept(self, importance: Sequence[float], scores: Sequence[Tensor]) -> Chosen:
        there = self.widths.neurons
        shares = kept_shares(importance, self.sparsity, self.steepness)
        wanted = [share * number for share, number in zip(shares, there, strict=True)]
        total = round((1 - self.sparsity) * sum(there))
        numbers = shared_out(wanted, there, total, multiple_of=self.multiple_of)
        neurons = [highest(score, number) for score, number in zip(scores, numbers, strict=True)]
        return replace(everything(self.widths), neurons=neurons)


def angle_between(before: Tensor, after: Tensor) -> Tensor:
    """Return the sum over tokens of the angle between input and output of a block [B, S, H], over pi, fp64 ()."""
    cosine = F.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
    return (cosine.arccos() / math.pi).sum()


def kept_shares(importance: Sequence[float], sparsity: float, steepness: float) -> list[float]:
    """Return the share of its neurons that each block keeps, their mean 1 - sparsity.

    Args:
        importance: Of each block, its mean angle over pi.
        sparsity: Share of all neurons that goes.
        steepness: See `Cfsp`.
    """
    mean = sum(importance) / len(importance)
    deviations = torch.tensor(importance, dtype=torch.float64) - mean
    found = (steepness * deviations).sigmoid().tolist()
    average, most = sum(found) / len(found), max(found)
    if most / average * (1 - sparsity) >= 1 and most > average:
        # Deviations shrink until no block wants more than it has.
        shrink = average * (1 / (1 - sparsity) - 1) / (most - average) / _HEADROOM
        found = [average + (value - average) * shrink for value in found]
    return [value / average * (1 - sparsity) for value in found]


def neuron_scores(norms: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the importance of the neurons of an MLP [I].

    A neuron's mean share in |gate|, |up| and |down| x activation, over what the matrices read and write, times the root
    mean square of its activation.

    Args:
        norms: Root mean square of each neuron's activation [I].
        gate: [I, H].
        up: [I, H].
        down: [H, I].
    """
    parts = (gate.abs(), up.abs(), (down.abs() * norms).t())
    tiny = torch.finfo(norms.dtype).tiny
    shares = [(part / part.sum(0).clamp(min=tiny)).mean(1) for part in parts]
    return torch.stack(shares).sum(0) * norms
