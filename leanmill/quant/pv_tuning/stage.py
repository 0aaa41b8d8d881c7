"""A weight as codes that rest while levels train."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanmill.core.errors import RunError
from leanmill.core.facets import Codes
from leanmill.core.stage import Slot, Stage
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, make_grid
from leanmill.quant.clusters import weighted_levels
from leanmill.quant.codes import grid_codes
from leanmill.quant.grids import UniformGrid
from leanmill.quant.rules import LeastSquares, step_of_levels
from leanmill.quant.sharing import Sharing


Levels = Literal["symmetric", "signed", "midrise", "codebook"]
_CLUSTER_STEPS = 50


class PvStage(Stage):
    """Stand in for a weight [..., out, in] by what its codes stand for; its gradient passes to it unchanged.

    Args:
        weight: The weight it will be given: shape and device are taken.
        num_bits: Of a code, 1 to 8.
        levels: See `PvTuning`.
        group_size: Neighbours that share a scale; None is the row.
    """

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "pv_tuning"

    def __init__(self, weight: Tensor, num_bits: int, levels: Levels, group_size: int | None) -> None:
        super().__init__()
        self.num_bits, self.kind, self.group_size = num_bits, levels, group_size
        device = weight.device
        # Numbers, since an engine may leave parameters without their shape.
        self.num_in = weight.shape[-1]
        self.width = 2**num_bits if levels == "codebook" else self.num_in // (group_size or self.num_in)
        self.levels = nn.Parameter(torch.empty(*weight.shape[:-1], self.width, dtype=torch.float32, device=device))
        """[..., out, groups] scales, or the levels themselves [..., out, 2^b], fp32."""
        chosen = torch.empty(weight.shape, dtype=torch.uint8, device=device)
        self.chosen = nn.Parameter(chosen, requires_grad=False)
        """Codes [..., out, in] uint8 from 0, frozen, so that they are sharded and saved with the weight."""

    @property
    def zero(self) -> float | None:
        """The code that stands for 0, perhaps half one, where levels are multiples of a scale."""
        if self.kind == "codebook":
            return None
        grid = make_grid(self.num_bits, self.kind)
        return -grid.low - grid.shift

    @property
    def num_codes(self) -> int:
        """Codes are 0 to one less."""
        if self.kind == "codebook":
            return int(2**self.num_bits)
        grid = make_grid(self.num_bits, self.kind)
        return grid.high - grid.low + 1

    def forward(self, weight: Tensor) -> Tensor:
        return _Decoded.apply(weight, self.levels, self.chosen, self.zero)  # type: ignore[no-any-return]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.levels.fill_(1.0)
        self.chosen.fill_(0)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        exact = weight.float()
        if not bool(exact.isfinite().all()):
            raise RunError("pv_tuning: a weight holds what is not finite; give a model from before its run diverged")
        if self.kind == "codebook":
            self._cluster(exact)
            return
        grid, sharing = UniformGrid(self.num_bits, self.kind), self._sharing
        candidates = [LeastSquares().scale(exact, grid, sharing), step_of_levels(exact, grid, sharing)]
        candidates = [scale.clamp(min=SMALLEST_SCALE) for scale in candidates]
        errors = [sharing.total((grid.rounded(exact, scale) - exact).square()) for scale in candidates]
        scale = torch.where(errors[1] < errors[0], candidates[1], candidates[0])
        assert self.zero is not None
        units = exact / sharing.spread(scale, exact.shape[-1]) + self.zero
        self.levels.copy_(scale)
        self.chosen.copy_(units.round().clamp(0, self.num_codes - 1))

    def _cluster(self, weight: Tensor) -> None:
        rows = weight.flatten(0, -2)
        levels = weighted_levels(rows, torch.ones_like(rows), self.num_codes, _CLUSTER_STEPS)
        for number, row in enumerate(rows):
            distinct = row.unique()
            if len(distinct) <= self.num_codes:  # what a pass left is kept as it is
                levels[number] = nn.functional.pad(
                    distinct[None], (0, self.num_codes - len(distinct)), mode="replicate"
                )
        between = ((levels[:, 1:].double() + levels[:, :-1].double()) / 2).contiguous()
        self.levels.copy_(levels.view_as(self.levels))
        self.chosen.copy_(torch.searchsorted(between, rows.double().contiguous()).view_as(self.chosen))

    @property
    def _sharing(self) -> Sharing:
        return Sharing("row") if self.group_size is None else Sharing("group", self.group_size)

    def codes(self, weight: Tensor) -> Codes | None:
        if self.kind == "codebook":
            return None
        values = self(weight.float())
        return grid_codes(values, self.levels.detach().clamp(min=SMALLEST_SCALE), self.num_bits, self.kind)

    def extra_repr(self) -> str:
        return f"{self.num_bits} bits, {self.kind}, group_size={self.group_size}"


class _Decoded(torch.autograd.Function):
    """What codes stand for. Levels receive the gradient of the weights that have them, codes at rest."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor, chosen: Tensor, zero: float | None) -> Tensor:
        ctx.save_for_backward(levels, chosen)
        ctx.zero = zero
        exact = levels.to(torch.promote_types(levels.dtype, torch.float32))
        if zero is None:
            return exact.gather(-1, chosen.long()).to(weight.dtype)
        units = (chosen.to(exact.dtype) - zero).unflatten(-1, (levels.shape[-1], -1))
        return (units * exact.unsqueeze(-1)).flatten(-2).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        levels, chosen = ctx.saved_tensors
        exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if ctx.zero is None:
            to_levels = exact.new_zeros(levels.shape).scatter_add_(-1, chosen.long(), exact)
        else:
            units = chosen.to(exact.dtype) - ctx.zero
            to_levels = (exact * units).unflatten(-1, (levels.shape[-1], -1)).sum(-1)
        return grad, to_levels.to(levels.dtype), None, None
