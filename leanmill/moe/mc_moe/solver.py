"""MC-MoE's mixed-precision quantisation of one layer's experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.gram import Gram
from leanmill.core.obs import Factor, inverse_factor
from leanmill.core.passes import ExpertLayer, ExpertSolution
from leanmill.moe.mc_moe.grid import corrected, rounded
from leanmill.moe.mc_moe.program import CHOICES, assign_bits, feasible_bits, total_bits


Expert = dict[str, Tensor]
_BINS = 4096


class McMoeSolver:
    """Looks at what each expert matters and loses, gives bits by that, and rounds.

    Args:
        average_bits: See `McMoe`.
        powers: Of frequency, weight and error.
        group_size: Neighbours in a row that share a scale; None is the row.
        damping: See `inverse_factor`.
        leaves_out_second: See `McMoe`.
    """

    def __init__(
        self,
        *,
        average_bits: float,
        powers: tuple[float, float, float],
        group_size: int | None,
        damping: float,
        leaves_out_second: bool,
    ) -> None:
        self.average_bits, self.powers, self.group_size, self.damping = average_bits, powers, group_size, damping
        self.leaves_out_second = leaves_out_second

    def check(self, config: Any) -> None:
        num_experts = config.num_experts
        bits, (least, most) = total_bits(self.average_bits, num_experts), feasible_bits(num_experts)
        if not least <= bits <= most:
            raise ConfigError(
                f"mc_moe: average_bits={self.average_bits} gives {num_experts} experts {bits} bits, and with one of 3 "
                f"and one of 2 bits among them they take {least} to {most}; type average_bits between "
                f"{least / num_experts:g} and {most / num_experts:g}"
            )
        if self.leaves_out_second and config.num_experts_per_tok != 2:
            raise ConfigError(
                f"mc_moe: leaves_out_second is for two experts a token, and this model has "
                f"{config.num_experts_per_tok}; remove it"
            )
        intermediate = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        for size in (config.hidden_size, intermediate):
            if self.group_size is not None and size % self.group_size:
                raise ConfigError(
                    f"mc_moe: group_size {self.group_size} does not divide the experts' {size} features; choose one "
                    f"that divides {config.hidden_size} and {intermediate}, or set group_size: null"
                )

    @torch.no_grad()
    def solve(self, layer: ExpertLayer) -> ExpertSolution:
        frequency, weight = self._importance(layer)
        error = torch.stack([self._errors(layer, expert) for expert in range(layer.num_experts)])
        alpha, beta, gamma = self.powers
        cost = (frequency**alpha * weight**beta)[:, None] * error**gamma
        bits = assign_bits(cost, total_bits(self.average_bits, layer.num_experts))
        solved = {expert: self._round(layer, expert, bits[expert]) for expert in range(layer.num_experts)}
        text = f"bits {' '.join(map(str, bits))}"
        if not self.leaves_out_second:
            return ExpertSolution(weights=solved, text=text)
        threshold = median_ratio(layer)
        text = f"{text}; second expert left out below {threshold:.3f} of the first"
        return ExpertSolution(weights=solved, text=text, inference={"threshold": threshold})

    def _importance(self, layer: ExpertLayer) -> tuple[Tensor, Tensor]:
        """The share of tokens that choose each expert, and its mean combine weight over all tokens, fp64."""
        flat = layer.chosen.flatten()
        taken = flat < layer.num_experts
        sums = torch.zeros(2, layer.num_experts, dtype=torch.float64)
        sums[0].index_add_(0, flat[taken], torch.ones_like(flat[taken], dtype=torch.float64))
        sums[1].index_add_(0, flat[taken], layer.weights.flatten()[taken].double())
        num_tokens = layer.total(torch.tensor([float(len(layer.hidden))], dtype=torch.float64))
        sums = layer.total(sums) / num_tokens
        return sums[0], sums[1]

    def _errors(self, layer: ExpertLayer, expert: int) -> Tensor:
        """||F(x) - F(x; expert at b bits)|| over all tokens, F the layer's output, for each b; by plain rounding."""
        rows, combine = _rows(layer, expert)
        weights = layer.read(expert)
        output = _run(layer, weights, rows)
        found = []
        for num_bits in CHOICES:
            other = {name: rounded(weight, num_bits, self.group_size) for name, weight in weights.items()}
            difference = (_run(layer, other, rows) - output) * combine[:, None]
            found.append(difference.double().square().sum())
        return layer.total(torch.stack(found)).sqrt()

    def _round(self, layer: ExpertLayer, expert: int, num_bits: int) -> Expert:
        """GPTQ: gate and up on the tokens of the expert, then down on what those, rounded, make of them."""
        rows, _ = _rows(layer, expert)
        weights = layer.read(expert)
        factor = self._factor(layer, rows, expert)
        found = {name: self._solve(weights[name], factor, num_bits) for name in ("gate", "up")}
        inner = layer.activation(rows @ found["gate"].t()) * (rows @ found["up"].t())
        found["down"] = self._solve(weights["down"], self._factor(layer, inner, expert), num_bits)
        return found

    def _solve(self, weight: Tensor, factor: Factor | None, num_bits: int) -> Tensor:
        if factor is None:
            return rounded(weight, num_bits, self.group_size)
        return corrected(weight, factor, num_bits, self.group_size)

    def _factor(self, layer: ExpertLayer, rows: Tensor, expert: int) -> Factor | None:
        """Of the inputs' gram matrix over all ranks; None where no token of any rank came by."""
        gram = Gram(rows.shape[1])
        gram.add(rows)
        gram.reduce(layer.total)
        if not bool(gram.diagonal().any()):
            return None
        try:
            return inverse_factor(gram, self.damping)
        except ValueError as error:
            raise RunError(f"layer {layer.index}, expert {expert}: {error}") from None


def median_ratio(layer: ExpertLayer) -> float:
    """Return the median over all ranks' tokens of the second combine weight over the first, to 1 / `_BINS`."""
    ratios = layer.weights.amin(-1) / layer.weights.amax(-1).clamp(min=torch.finfo(layer.weights.dtype).tiny)
    # Ranks have only to add up a histogram, and find the same on any number of them.
    counts = layer.total(torch.histc(ratios.double(), bins=_BINS, min=0, max=1))
    below = counts.cumsum(0)
    return (int((below < below[-1] / 2).sum()) + 0.5) / _BINS


def _rows(layer: ExpertLayer, expert: int) -> tuple[Tensor, Tensor]:
    """This rank's tokens [N, H] that chose the expert, fp32, and their combine weights [N]."""
    token, place = torch.where(layer.chosen == expert)
    return layer.hidden[token].float(), layer.weights[token, place]


def _run(layer: ExpertLayer, weights: Expert, rows: Tensor) -> Tensor:
    gate, up = rows @ weights["gate"].t(), rows @ weights["up"].t()
    return (layer.activation(gate) * up) @ weights["down"].t()
