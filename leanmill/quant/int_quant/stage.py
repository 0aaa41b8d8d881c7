"""Symmetric integer grids as stages of weights and activations."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.core.stage import Codes, InputSlot, InputStage, PartStaging, Slot, Stage, Statistic
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.quant.codes import grid_codes
from leanmill.quant.scales import Granularity, symmetric_scale


class IntWeights(Stage):
    """Round a weight [..., out, in] to symmetric codes of `num_bits`; the gradient passes unchanged.

    Args:
        num_bits: 2 to 8.
        scale: `absmax` or `mse`, see `IntQuant`.
        granularity: What shares a scale.
        group_size: Neighbours of a group.
    """

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "int_quant"
    once_a_step: ClassVar[bool] = True

    def __init__(
        self,
        num_bits: int,
        scale: Literal["absmax", "mse"] = "absmax",
        granularity: Granularity = "row",
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_bits, self.scale, self.granularity, self.group_size = num_bits, scale, granularity, group_size

    def forward(self, weight: Tensor) -> Tensor:
        return self._rounded(weight, self._scale_of(weight))

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        if self.granularity != "tensor" or len(shape) > 2:
            return self.by_itself(part)  # each expert has a scale of its own
        return self._with_absmax(part) if self.scale == "absmax" else None

    def _with_absmax(self, part: Tensor) -> PartStaging:
        exact = part.detach().to(torch.promote_types(part.dtype, torch.float32))
        largest = torch.cat([exact.abs().flatten(), exact.new_zeros(1)]).amax().reshape(1)
        absmax = yield Statistic(largest, "max")
        return self._rounded(part, absmax.to(exact.dtype) / (2 ** (self.num_bits - 1) - 1))

    def _rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        return fake_quant(weight, scale, num_bits=self.num_bits, grid="symmetric", gradient="straight_through")

    def codes(self, weight: Tensor) -> Codes:
        return grid_codes(weight, self._scale_of(weight), self.num_bits, "symmetric")

    @torch.no_grad()
    def _scale_of(self, weight: Tensor) -> Tensor:
        return symmetric_scale(weight, self.num_bits, self.scale, self.granularity, self.group_size)

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, scale={self.scale}, granularity={self.granularity}"


class IntActivations(InputStage):
    """Round every token [..., in] to symmetric codes of `num_bits` by its largest magnitude, straight-through."""

    slot: ClassVar[InputSlot] = InputSlot.QUANT
    technique: ClassVar[str] = "int_quant"

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            exact = torch.promote_types(tokens.dtype, torch.float32)
            scale = tokens.abs().amax(-1, keepdim=True).to(exact) / (2 ** (self.num_bits - 1) - 1)
        return fake_quant(tokens, scale, num_bits=self.num_bits, grid="symmetric", gradient="straight_through")

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}"
