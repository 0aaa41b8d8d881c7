"""Signs with the mean magnitude as a stage."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.facets import Codes, PartStaging, Statistic
from leanmill.core.operands import lend
from leanmill.quant.inputs import Int8Input, NormInput
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import QuantStage


class BinaryStage(QuantStage):
    """Snap a weight [..., out, in] to {-s, s} with s = mean |w|; the gradient passes unchanged.

    Weights that are exactly 0 stay 0, so that a mask before this stage holds, and do not count in either mean.

    Args:
        sharing: What shares an s.
        center: Whether signs are those of w - mean w, else those of w; what lies on the border counts as positive.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "binary"

    def __init__(
        self, sharing: Sharing, *, center: bool, has_warmup: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__(sharing, has_warmup=has_warmup, device=device)
        self.center = center

    def rounded(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            sums = torch.stack([self.sharing.total(terms) for terms in _terms(weight)])
        return self._signs(weight, sums)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        sums = yield Statistic(torch.stack([terms.sum() for terms in _terms(part.detach())]))
        return self._signs(part, sums.reshape(3, 1))

    def _signs(self, weight: Tensor, sums: Tensor) -> Tensor:
        """Signs of a weight, or of a part of it, by the sums of what shares a scale [3, ...], see `_terms`."""
        with torch.no_grad():
            exact = torch.promote_types(weight.dtype, torch.float32)
            magnitude, total, count = sums
            # Rounded once, so that the levels are the same number everywhere in the weight's dtype.
            level = (magnitude / count.clamp(min=1)).to(exact).to(weight.dtype)
            border = (total / count.clamp(min=1)).to(exact) if self.center else torch.zeros_like(total, dtype=exact)
            level, border = (self.sharing.spread(values, weight.shape[-1]) for values in (level, border))
            signs = torch.where(weight.to(exact) < border, -level, level).masked_fill_(weight == 0, 0.0)
        return lend(weight, signs)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes | None:
        if self.is_mixed:
            return None
        signs = self.rounded(weight).float()
        scales = self.sharing.largest(signs)
        if self.sharing.granularity == "tensor":
            # One scale a row is what packed layers hold; it may be the same for all.
            scales = scales.reshape(*weight.shape[:-2], 1, 1).expand(*weight.shape[:-1], 1)
        if bool((signs == 0).any()):
            return Codes(values=signs.sign().to(torch.int8), encoding="ternary", scales=scales, zero=0.0)
        return Codes(values=(signs > 0).to(torch.uint8), encoding=1, scales=2 * scales, zero=0.5)

    def extra_repr(self) -> str:
        return f"{self.sharing}, center={self.center}"


def _terms(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is summed: magnitudes, values, and ones where there is a weight, in fp64 so that no order shows."""
    exact = weight.double()
    return exact.abs(), exact, (weight != 0).double()


class BinaryInt8(Int8Input):
    """Tokens of 8 bits before binary weights (BitNet)."""

    technique: ClassVar[str] = "binary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet",)


class BinaryNorm(NormInput):
    """The norm inside of BitNet's layers."""

    technique: ClassVar[str] = "binary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet",)
