"""What stands around a decoder block that may be dropped."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.core.around import Around, Call, Ring
from leanmill.core.errors import RunError
from leanmill.core.noise import Noise, uniform


Granularity = Literal["row", "batch"]


class DroppedBlock(Around):
    """In training, leaves the residual stream as it is instead of running the block, with probability `rate`.

    By row: every row of the batch is decided for by its number in the data. The block runs, and its
    output counts for the rows that are kept, so all ranks run the same and every weight has a gradient.
    By batch: one decision a step, for all rows of all ranks. A dropped block does not run; its weights get
    gradients of zero, as they do where all rows are dropped.

    Args:
        name: Of the block; what it draws depends on it.
        granularity: What shares a decision.
        rescale: Divide what a kept block adds by its probability of being kept.
    """

    technique: ClassVar[str] = "stochastic_depth"
    ring: ClassVar[Ring] = Ring.SKIP

    rate: Tensor
    """fp32 (1,): probability of being dropped in this step."""

    def __init__(self, name: str, granularity: Granularity, rescale: bool) -> None:
        super().__init__()
        self.granularity, self.rescale = granularity, rescale
        self.noise = Noise(f"{self.technique}/{name}")
        # Not on meta, where it would lose its value.
        self.register_buffer("rate", torch.zeros(1, device="cpu"), persistent=False)
        self.row_ids: Tensor | None = None
        """[B] int64: rows of the micro-batch under way."""
        self.is_dropped = False
        """By batch: the decision of this step. A compiled block has one graph for each value."""

    def forward(self, call: Call, /, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the block on `hidden` [B, S, H], or not."""
        if not self.training:
            return call(hidden, *args, **kwargs)  # type: ignore[no-any-return]
        if self.is_dropped:
            return self.without_running(hidden)
        output: Tensor = call(hidden, *args, **kwargs)
        if self.rescale:
            output = torch.addcdiv(hidden, output - hidden, (1 - self.rate).to(hidden.dtype))
        return output if self.granularity == "batch" else torch.where(self._kept(hidden), output, hidden)

    def _kept(self, hidden: Tensor) -> Tensor:
        if self.row_ids is None:
            raise RunError("stochastic_depth decides by row, and was not told which rows a batch has")
        kept = uniform(self.noise.key, self.row_ids) >= self.rate
        return kept.view(-1, *[1] * (hidden.dim() - 1))
