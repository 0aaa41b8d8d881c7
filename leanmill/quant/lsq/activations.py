"""Learned step sizes and offsets of activations as an input stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.quant.grids import UniformGrid
from leanmill.quant.stages import QuantInput


class LsqActivations(QuantInput):
    """Round activations [..., in] to a grid with one trained step; gradients of value and step are LSQ's.

    The step is `initial` + `moved`. `CalibrateSteps` writes the first, a buffer, which engines that keep
    masters of parameters would not let it do to a parameter; the second is trained from 0. Before that,
    everything is NaN. The offset of LSQ+ is made up likewise.

    Args:
        num_features: `in`, N of the gradient scale 1 / sqrt(N Qp).
        num_bits: 1 to 8.
        grid: `signed`, `unsigned` for activations that are never negative, or `midrise`, which leaves out zero.
        has_offset: Whether codes stand around a trained offset (LSQ+), and not around 0.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "lsq"
    initial: Tensor
    """(1,) fp32; 0 until it is known."""
    initial_offset: Tensor | None
    """(1,) fp32."""

    def __init__(
        self,
        num_features: int,
        num_bits: int,
        grid: Literal["signed", "unsigned", "midrise"] = "signed",
        *,
        has_offset: bool = False,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(has_warmup=has_warmup, device=device)
        self.num_features, self.grid = num_features, UniformGrid(num_bits, grid)
        self.moved = nn.Parameter(torch.zeros(1, device=device))
        self.register_buffer("initial", torch.zeros(1, device=device))
        self.moved_offset = nn.Parameter(torch.zeros(1, device=device)) if has_offset else None
        self.register_buffer("initial_offset", torch.zeros(1, device=device) if has_offset else None)
        self.watch: Callable[[Tensor], None] | None = None
        """Is shown the activations, which are then passed on as they are."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(tokens.detach())
            return tokens
        return super().forward(tokens)

    def rounded(self, tokens: Tensor) -> Tensor:
        step = self.initial.masked_fill(self.initial == 0, torch.nan) + self.moved
        offset: Tensor | None = self.moved_offset
        if offset is not None and self.initial_offset is not None:
            offset = self.initial_offset + offset
        grad_scale = (self.num_features * self.grid.largest_code) ** -0.5
        return self.grid.rounded(tokens, step, offset, grad_scale=grad_scale)

    @property
    def has_offset(self) -> bool:
        """Whether codes stand around a trained offset."""
        return self.moved_offset is not None

    @torch.no_grad()
    def begin_at(self, step: float, offset: float) -> None:
        """Write where training starts."""
        self.initial.fill_(step)
        if self.initial_offset is not None:
            self.initial_offset.fill_(offset)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.moved.zero_()
        self.initial.zero_()
        for tensor in (self.moved_offset, self.initial_offset):
            if tensor is not None:
                tensor.zero_()

    def extra_repr(self) -> str:
        return f"{self.grid}, has_offset={self.has_offset}"
