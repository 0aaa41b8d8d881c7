"""A quantiser with learned step sizes as a stage."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.stage import Codes, LearnedGrid, PartStaging, Slot, Stage
from leanmill.kernels.fake_quant.grid import Kind, default_grad_scale, make_grid
from leanmill.kernels.fake_quant.op import fake_quant, initial_scale
from leanmill.quant.codes import grid_codes
from leanmill.quant.scales import Granularity, scale_shape


class LsqStage(Stage):
    """Round a weight [..., out, in] to a grid with trained steps; gradients of value and step are LSQ's.

    Args:
        weight: The weight it will be given: shape and device are taken.
        num_bits: 1 to 8.
        grid: See `fake_quant`.
        granularity: What shares a step.
        group_size: Neighbours of a group.
    """

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "lsq"
    once_a_step: ClassVar[bool] = True

    def __init__(
        self,
        weight: Tensor,
        num_bits: int,
        grid: Kind = "signed",
        granularity: Granularity = "tensor",
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_bits, self.grid = num_bits, grid
        self.is_shared = granularity == "tensor" and weight.dim() == 2
        shape = scale_shape(weight.shape, granularity, group_size)
        self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quant(weight, self.scale, num_bits=self.num_bits, grid=self.grid)

    def codes(self, weight: Tensor) -> Codes:
        return grid_codes(weight, self.scale, self.num_bits, self.grid)

    def learned_grid(self) -> LearnedGrid:
        return LearnedGrid(scale=self.scale, num_bits=self.num_bits, kind=self.grid)

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self._with_shared_step(part, shape) if self.is_shared else self.by_itself(part)

    def _with_shared_step(self, part: Tensor, shape: torch.Size) -> PartStaging:
        # LSQ divides the step's gradient by the number of weights that share it, here or elsewhere.
        grad_scale = default_grad_scale(torch.empty(shape, device="meta"), 1, make_grid(self.num_bits, self.grid))
        return fake_quant(part, self.scale, num_bits=self.num_bits, grid=self.grid, grad_scale=grad_scale)
        yield

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.fill_(1.0)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        self.scale.copy_(initial_scale(weight, tuple(self.scale.shape), num_bits=self.num_bits, grid=self.grid))

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, grid={self.grid}, scales={tuple(self.scale.shape)}"
