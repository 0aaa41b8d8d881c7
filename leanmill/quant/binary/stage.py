"""Signs with the mean magnitude as stages: one basis or several, beside weights that are kept, of a wave."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanmill.core.facets import Codes, PartStaging, Statistic
from leanmill.core.operands import lend
from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE
from leanmill.quant.bits import SwitchedBits
from leanmill.quant.inputs import Int8Input, NormInput
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import QuantStage


class BinaryStage(SwitchedBits, QuantStage):
    """Snap a weight [..., out, in] to {-s, s} with s = mean |w|; the gradient passes unchanged.

    Further bases snap what the ones before left over in the same way, and are added. Weights that are exactly 0 stay 0,
    so that a mask before this stage holds, and do not count in any mean.

    Args:
        sharing: What shares an s.
        center: Whether signs are those of w - mean w, else those of w; what lies on the border counts as positive.
        num_bases: Signs with an s of their own that are added up, once training is over.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "binary"

    def __init__(
        self,
        sharing: Sharing,
        *,
        center: bool,
        num_bases: int = 1,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sharing, has_warmup=has_warmup, device=device)
        self.center = center
        self.own_bits = self.num_bases = num_bases

    def switch_to(self, num_bits: int) -> None:
        self.num_bases = num_bits

    # A loop each: a compiled block cannot take what a generator returns.

    def rounded(self, weight: Tensor) -> Tensor:
        exact, total = _exact(weight), None
        for _ in range(self.num_bases):
            terms = _terms(_left(exact, total), exact != 0)
            total = self._with_basis(exact, total, torch.stack([self.sharing.total(term) for term in terms]))
        return _lent(weight, total)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        exact, total = _exact(part), None
        for _ in range(self.num_bases):
            terms = _terms(_left(exact, total), exact != 0)
            sums = yield Statistic(torch.stack([term.sum() for term in terms]))
            total = self._with_basis(exact, total, sums.reshape(len(terms), 1))
        return _lent(part, total)

    def _with_basis(self, exact: Tensor, total: Tensor | None, sums: Tensor) -> Tensor:
        """Add a basis to those there are, `total`, by the sums of what they left over."""
        signs = self._signs(_left(exact, total), sums).masked_fill_(exact == 0, 0.0)
        return signs if total is None else total + signs

    def _signs(self, rest: Tensor, sums: Tensor) -> Tensor:
        """Signs of what is left, by the sums of what shares an s [3, ...], see `_terms`."""
        magnitude, total, count = sums
        level = (magnitude / count.clamp(min=1)).to(rest.dtype)
        border = (total / count.clamp(min=1)).to(rest.dtype) if self.center else torch.zeros_like(level)
        level, border = (self.sharing.spread(values, rest.shape[-1]) for values in (level, border))
        return torch.where(rest < border, -level, level)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes | None:
        if self.is_mixed or self.num_bases > 1:
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
        return f"{self.sharing}, center={self.center}, num_bases={self.num_bases}"


class SalientStage(BinaryStage):
    """Keep the weights [..., out, in] of largest magnitude at 8 bits as they were loaded, and binarise the others.

    PB-LLM (Shang et al. 2023, arXiv:2310.00034). Which are kept is settled once, and their codes too, by an absmax
    scale a row: they get no gradient and no decay. The others are those of `BinaryStage`, and they alone count in its
    means. What arrives as 0 stays 0, also where it was kept.

    Args:
        weight: The weight it will be given: shape and device are taken.
        share: Of each matrix, above 0 and below 1.
        sharing: See `BinaryStage`.
        center: See `BinaryStage`.
        has_warmup: See `WarmedUp`.
    """

    def __init__(
        self, weight: Tensor, share: float, sharing: Sharing, *, center: bool, has_warmup: bool = False
    ) -> None:
        super().__init__(sharing, center=center, has_warmup=has_warmup, device=weight.device)
        self.share = share
        kept, rows = weight.shape, (*weight.shape[:-1], 1)
        device = weight.device
        self.kept = nn.Parameter(torch.zeros(kept, dtype=torch.int8, device=device), requires_grad=False)
        self.kept_scale = nn.Parameter(torch.ones(rows, dtype=torch.float32, device=device), requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.kept.zero_()
        self.kept_scale.fill_(1.0)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        magnitudes = weight.abs().flatten(-2)
        num_kept = round(self.share * magnitudes.shape[-1])
        order = magnitudes.argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
        is_kept = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)
        scale = weight.abs().amax(-1, keepdim=True) / 127
        # A code of 0 would say that it is not kept.
        magnitude = (weight.abs() / scale.clamp(min=SMALLEST_SCALE)).round().clamp(1, 127)
        self.kept.copy_(weight.sign() * magnitude.nan_to_num(0.0) * is_kept)
        self.kept_scale.copy_(scale)

    def rounded(self, weight: Tensor) -> Tensor:
        return self._with_kept(weight, super().rounded(self._others(weight)))

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self._with_kept(part, (yield from super().rounded_part(self._others(part), shape)))

    def _others(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(self.kept != 0, 0.0)

    def _with_kept(self, weight: Tensor, signs: Tensor) -> Tensor:
        kept = (self.kept * self.kept_scale).to(weight.dtype)
        return torch.where((self.kept != 0) & (weight != 0), kept, signs)

    def codes(self, weight: Tensor) -> Codes | None:
        return None  # of two kinds

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, share={self.share}"


class PeriodicStage(BinaryStage):
    """s sign(sin(frequency w)) of a weight [..., out, in], s = mean |w|, and the gradient of s sin(frequency w).

    BiPer (Vargas et al. 2024, arXiv:2404.01278). A warm-up goes from s sin(frequency w) itself, the paper's first
    stage, to its sign. s counts as a constant; in the paper it is trained.

    Args:
        frequency: Radians a unit of weight.
        sharing: What shares an s.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    def __init__(
        self,
        frequency: float,
        sharing: Sharing,
        *,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sharing, center=False, has_warmup=has_warmup, device=device)
        self.frequency = frequency

    def rounded(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            terms = _terms(weight.to(torch.promote_types(weight.dtype, torch.float32)), weight != 0)
            sums = torch.stack([self.sharing.total(term) for term in terms])
        return self._wave(weight, sums)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        with torch.no_grad():
            terms = _terms(part.to(torch.promote_types(part.dtype, torch.float32)), part != 0)
        sums = yield Statistic(torch.stack([term.sum() for term in terms]))
        return self._wave(part, sums.reshape(len(terms), 1))

    def _wave(self, weight: Tensor, sums: Tensor) -> Tensor:
        magnitude, _, count = sums
        exact = torch.promote_types(weight.dtype, torch.float32)
        level = self.sharing.spread((magnitude / count.clamp(min=1)).to(exact), weight.shape[-1])
        return _Wave.apply(weight, level, self.strength, self.frequency)  # type: ignore[no-any-return]

    def mixed(self, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded  # by `rounded` itself

    def extra_repr(self) -> str:
        return f"{self.sharing}, frequency={self.frequency}"


class _Wave(torch.autograd.Function):
    """Between level sin(frequency w) and level sign(sin(frequency w)); keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, level: Tensor, strength: Tensor | None, frequency: float) -> Tensor:
        ctx.save_for_backward(weight, level)
        ctx.frequency = frequency
        wave = (weight.to(level.dtype) * frequency).sin()
        signs = torch.where(wave.isnan(), wave, wave.sign())  # torch has 0 for the sign of a NaN
        mixed = signs if strength is None else torch.lerp(wave, signs, strength.to(level.dtype))
        return (level * mixed).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, level = ctx.saved_tensors
        slope = level * ctx.frequency * (weight.to(level.dtype) * ctx.frequency).cos()
        return (grad.to(level.dtype) * slope).to(grad.dtype), None, None, None


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _left(exact: Tensor, total: Tensor | None) -> Tensor:
    return exact if total is None else exact - total


def _lent(weight: Tensor, total: Tensor | None) -> Tensor:
    assert total is not None
    # Rounded once, so that the levels are the same number everywhere in the weight's dtype.
    return lend(weight, total.to(weight.dtype))


def _terms(rest: Tensor, is_kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is summed: magnitudes, values, and ones where there is a weight, in fp64 so that no order shows."""
    exact = rest.double()
    return exact.abs(), exact, is_kept.double()


class BinaryInt8(Int8Input):
    """Tokens of 8 bits before binary weights (BitNet)."""

    technique: ClassVar[str] = "binary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet",)


class BinaryNorm(NormInput):
    """The norm inside of BitNet's layers."""

    technique: ClassVar[str] = "binary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet",)
