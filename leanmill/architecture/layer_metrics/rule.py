"""Norms of weights and shares of gradients by decoder block, from the pieces that ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.rules import StepContext, StepRule


REST = "rest"
"""What lies in no decoder block: embeddings, the last norm, the head."""


class LayerNorms(StepRule):
    """Sums squares of weights and of gradients by block, in steps that are logged.

    Reports `weight_norm/LAYER`, the Euclidean norm of a block's trained weights, and `gradient_share/LAYER`, the share
    of the squared norm of the whole gradient, as it is before clipping. They add up to 1, or are 0 without a gradient.

    Args:
        model: Walked anew every step.
    """

    name = "layer_metrics"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._squares: dict[str, Tensor] = {}
        """By layer: sums of squares of weights and of gradients [2]."""

    def before_optimizer(self, context: StepContext) -> None:
        self._squares = {}
        if not context.is_reported or context.views is None:
            return
        for layer, parameter in self._parameters():
            view = context.views.of(parameter)
            grad = view.grad
            pieces = [
                _sum_of_squares(view.value),
                _sum_of_squares(grad) if grad is not None else view.value.new_zeros(()),
            ]
            found = view.reduce(torch.stack([piece.float() for piece in pieces]), "sum")
            self._squares[layer] = self._squares[layer] + found if layer in self._squares else found

    def metrics(self) -> Mapping[str, float]:
        if not self._squares:
            return {}
        weights, gradients = torch.stack(list(self._squares.values())).double().unbind(-1)
        total = gradients.sum()
        shares = gradients if total == 0 else gradients / total  # no gradient, no share
        found = {}
        for index, layer in enumerate(self._squares):
            found[f"weight_norm/{layer}"] = float(weights[index].sqrt())
            found[f"gradient_share/{layer}"] = float(shares[index])
        return found

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that train with the layer they are in, each once."""
        blocks = decoder_blocks(self.model)
        layer_of = {id(p): str(index) for index, block in enumerate(blocks) for p in block.parameters()}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield layer_of.get(id(parameter), REST), parameter


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()
