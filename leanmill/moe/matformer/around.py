"""What stands around the down projection of a nested MLP."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.around import Around, Call, Ring


class NestedWidth(Around):
    """In training, hands on the first neurons only; the others get, and give, gradients of zero.

    Zeros in what enters the down projection make the whole MLP that of the first neurons, forward and backward: rows of
    the gate and up projections behind them get no gradient, nor do columns of the down projection. Weights stay whole,
    so masks, quantisers, deltas and shards of them do as well, and a step costs what one of the full width does.

    Args:
        width: Neurons I of the MLP.
        num_parts: Sub-models that share the rows of a batch, one after another; each has rows of its own.
    """

    technique: ClassVar[str] = "matformer"
    ring: ClassVar[Ring] = Ring.SCALE

    widths: Tensor
    """int64 (num_parts, 1): neurons that each part of the rows uses in this step."""

    def __init__(self, width: int, num_parts: int = 1) -> None:
        super().__init__()
        self.width = width
        # Not on meta, where it would lose its value.
        self.register_buffer("widths", torch.full((num_parts, 1), width, device="cpu"), persistent=False)

    def forward(self, call: Call, /, hidden: Tensor) -> Tensor:
        """Run the projection on `hidden` [..., I]."""
        if not self.training:
            return call(hidden)  # type: ignore[no-any-return]
        keep = torch.arange(self.width, device=hidden.device) < self.widths
        parts = hidden.reshape(len(self.widths), -1, self.width)
        return call(torch.where(keep[:, None], parts, 0.0).reshape(hidden.shape))  # type: ignore[no-any-return]
