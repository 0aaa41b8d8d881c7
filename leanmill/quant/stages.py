"""What quantisers of weights and activations share: a method says how values are rounded, the rest is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.facets import Codes, LearnedGrid, PartStaging
from leanmill.core.stage import InputSlot, InputStage, Slot, Stage
from leanmill.kernels.fake_quant.grid import default_grad_scale, make_grid
from leanmill.quant.grids import Grid, UniformGrid
from leanmill.quant.rules import ScaleOfPart, ScaleRule
from leanmill.quant.sharing import Sharing
from leanmill.quant.warmup import WarmedUp


class QuantStage(WarmedUp, Stage):
    """Base of quantisers of a weight [..., out, in].

    Args:
        sharing: What shares a scale.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    slot: ClassVar[Slot] = Slot.QUANT
    once_a_step: ClassVar[bool] = True

    def __init__(self, sharing: Sharing, *, has_warmup: bool = False, device: torch.device | None = None) -> None:
        super().__init__(has_warmup=has_warmup, device=device)
        self.sharing = sharing

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, same shape and dtype."""
        raise NotImplementedError

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        """Round some rows of a weight whose rows share a scale, as `on_part`; None where that needs all of them."""
        return None

    def forward(self, weight: Tensor) -> Tensor:
        return self.mixed(weight, self.rounded(weight))

    def spans_rows(self, weight_shape: Sequence[int]) -> bool:
        """Whether a row's result depends on other rows; each expert of a stacked weight is by itself."""
        return self.sharing.spans_rows(weight_shape)

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        if not self.spans_rows(shape):
            return self.by_itself(part)  # each expert has scales of its own
        staging = self.rounded_part(part, shape)
        return None if staging is None else self._mixed_part(part, staging)

    def _mixed_part(self, part: Tensor, staging: PartStaging) -> PartStaging:
        return self.mixed(part, (yield from staging))


class ComputedScale(QuantStage):
    """Round to a grid by scales that are computed from the weight whenever it is staged.

    Args:
        grid: Levels and estimator.
        rule: How scales follow from the weight.
        sharing: What shares one.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    def __init__(
        self,
        grid: Grid,
        rule: ScaleRule,
        sharing: Sharing,
        *,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sharing, has_warmup=has_warmup, device=device)
        self.grid, self.rule = grid, rule

    def rounded(self, weight: Tensor) -> Tensor:
        return self.grid.rounded(weight, self._scale_of(weight))

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        asking = self.rule.scale_of_part(part, self.grid)
        return None if asking is None else self._by_asking(part, asking)

    def _by_asking(self, part: Tensor, asking: ScaleOfPart) -> PartStaging:
        scale = yield from asking
        return self.grid.rounded(part, scale)

    def codes(self, weight: Tensor) -> Codes | None:
        return None if self.is_mixed else self.grid.codes(weight, self._scale_of(weight))

    @torch.no_grad()
    def _scale_of(self, weight: Tensor) -> Tensor:
        return self.rule.scale(weight, self.grid, self.sharing)

    def extra_repr(self) -> str:
        return f"{self.grid}, {self.rule}, {self.sharing}"


class LearnedScale(QuantStage):
    """Round to a grid by scales that are trained, with the gradients of `fake_quant`; 1 until they are initialised.

    Args:
        weight: The weight it will be given: shape and device are taken.
        grid: Levels.
        sharing: What shares a scale.
        has_warmup: See `WarmedUp`.
    """

    def __init__(self, weight: Tensor, grid: UniformGrid, sharing: Sharing, *, has_warmup: bool = False) -> None:
        super().__init__(sharing, has_warmup=has_warmup, device=weight.device)
        self.grid = grid
        shape = sharing.scale_shape(weight.shape)
        self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=weight.device))

    def rounded(self, weight: Tensor) -> Tensor:
        return self.grid.rounded(weight, self.scale)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        # LSQ divides the scale's gradient by the number of weights that share it, here or elsewhere.
        codes = make_grid(self.grid.num_bits, self.grid.kind)
        return self.grid.rounded(
            part, self.scale, grad_scale=default_grad_scale(torch.empty(shape, device="meta"), 1, codes)
        )
        yield

    def codes(self, weight: Tensor) -> Codes | None:
        return None if self.is_mixed else self.grid.codes(weight, self.scale)

    def learned_grid(self) -> LearnedGrid | None:
        if self.strength is not None:
            return None
        return LearnedGrid(scale=self.scale, num_bits=self.grid.num_bits, kind=self.grid.kind)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.scale.fill_(1.0)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        self.scale.copy_(self.start(weight))

    def start(self, weight: Tensor) -> Tensor:
        """Return the scales that training starts from, of the loaded weight."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.grid}, {self.sharing}, scales={tuple(self.scale.shape)}"


class QuantInput(WarmedUp, InputStage):
    """Base of quantisers of activations [..., in].

    Args:
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    slot: ClassVar[InputSlot] = InputSlot.QUANT

    def __init__(self, *, has_warmup: bool = False, device: torch.device | None = None) -> None:
        super().__init__(has_warmup=has_warmup, device=device)

    def rounded(self, tokens: Tensor) -> Tensor:
        """Return the rounded activations, same shape and dtype."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mixed(tokens, self.rounded(tokens))
