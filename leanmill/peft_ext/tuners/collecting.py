"""Layers that show a trainer the gradient of the whole weight, which is frozen and has none of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.peft_ext.tuners.additive import AdditiveLayer


class CollectingLayer(AdditiveLayer):
    """Such a layer that, when told to, adds up its weight's gradient over backward passes."""

    _collected: Tensor | None = None
    """The weight's gradient, while `collect` is on."""

    is_asked: bool = False
    """Whether a trainer will ask it to; the plan counts on it."""

    @property
    def bytes_watched(self) -> int:
        """Bytes that a rank holds while it does, see `leanmill.core.branches.bytes_watched`."""
        return 4 * self.out_features * self.in_features if self.is_asked else 0

    def collect(self, wanted: bool) -> None:
        """Add up the weight's gradient in every backward from now on, or forget it."""
        self._collected = torch.zeros(self.out_features, self.in_features) if wanted else None

    def collected(self) -> Tensor:
        """Return the gradient [out, in] of the weight since `collect`, fp32."""
        assert self._collected is not None
        return self._collected

    def add_gradient(self, outer: Tensor) -> None:
        """Add the weight's gradient [out, in] of one backward."""
        assert self._collected is not None
        self._collected = self._collected.to(outer.device).add_(outer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = super().forward(x, *args, **kwargs)
        if self._collected is None:
            return result
        return _Collected.apply(result, x, self)  # type: ignore[no-any-return]


class _Collected(torch.autograd.Function):
    """Identity on a layer's output; backward adds the outer product of its gradient and the input to the layer."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, tokens: Tensor, layer: CollectingLayer) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        ctx.layer.add_gradient(gradient.flatten(0, -2).float().t() @ tokens.flatten(0, -2).float())
        return gradient, None, None
