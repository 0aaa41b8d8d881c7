"""How likely a block is dropped, and how much an early exit counts, by layer and step. Plain arithmetic."""

from __future__ import annotations

from typing import Literal


OverLayers = Literal["exponential", "linear", "uniform"]
OverTime = Literal["constant", "exponential"]
Curriculum = Literal["rotational", "gradual", "all"]


def layer_factor(layer: int, num_layers: int, kind: OverLayers) -> float:
    """Return D(l), the share of the largest rate that block `layer` of 0 to L - 1 has.

    `exponential` is 2^(l / (L - 1)) - 1 (LayerSkip, 0 for the first and 1 for the last), `linear` is
    (l + 1) / L (stochastic depth), `uniform` is 1.
    """
    if kind == "exponential":
        return 2 ** _share(layer, num_layers) - 1
    return (layer + 1) / num_layers if kind == "linear" else 1.0


def time_factor(step: int, num_steps: int, kind: OverTime) -> float:
    """Return S(t), the share of its rate that a block has in step t of T: 1, or 2^(t / (T - 1)) - 1."""
    return 1.0 if kind == "constant" else 2 ** _share(step, num_steps) - 1


def exit_scales(num_layers: int, scale: float) -> list[float]:
    """Return e(l): scale x (0 + ... + l) for early exits, and L - 1 + scale x (0 + ... + L - 2) for the last block."""
    early = [scale * layer * (layer + 1) / 2 for layer in range(num_layers - 1)]
    return [*early, num_layers - 1 + scale * (num_layers - 2) * (num_layers - 1) / 2]


def is_exit(layer: int, num_layers: int, step: int, num_steps: int, curriculum: Curriculum, rotation: int) -> bool:
    """Return C(t, l), whether block `layer` has a loss in step t; the last one always has.

    `rotational` takes every `rotation`-th block and moves on by one block a step; `gradual` adds a block
    every T / (2 L) steps, from the last to the first, so that all take part in the second half.
    """
    if layer == num_layers - 1 or curriculum == "all":
        return True
    if curriculum == "rotational":
        return (layer - step) % rotation == 0
    return 2 * num_layers * step >= (num_layers - layer) * num_steps


def exit_weights(
    num_layers: int, step: int, num_steps: int, *, scale: float, curriculum: Curriculum, rotation: int
) -> list[float]:
    """Return the weights C(t, l) e(l) / sum_i C(t, i) e(i) of all blocks' losses in step t; they add up to 1."""
    on = [is_exit(layer, num_layers, step, num_steps, curriculum, rotation) for layer in range(num_layers)]
    weights = [e if is_on else 0.0 for e, is_on in zip(exit_scales(num_layers, scale), on, strict=True)]
    total = sum(weights)
    # A model of one block has e(0) = 0.
    return [weight / total for weight in weights] if total else [*[0.0] * (num_layers - 1), 1.0]


def _share(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0
