"""A weight kept as integers, decoded by scales that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.compact import CodedWeight
from leanmill.core.errors import ConfigError
from leanmill.core.facets import Codes
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.kernels.packing.encoding import Encoding, number_of, packed_length
from leanmill.kernels.packing.op import pack, unpack


SHARES = 40
"""Scales that are tried for a group, from that of its largest magnitude down to a fifth of it."""


class TrainedScales(CodedWeight):
    """Integers q [..., out, in] -> (q - zero) s, with a trained scale s for each group of neighbours in a row.

    Levels lie evenly around 0: 2^b - 1 of them, with 2 bits four at -1.5, -0.5, 0.5 and 1.5 scales.

    Args:
        shape: Of the weight, [..., out, in].
        num_bits: b, 2 to 8.
        group_size: Neighbours that share a scale; divides `in`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "peqa"

    def __init__(self, shape: Sequence[int], num_bits: int, group_size: int, device: torch.device) -> None:
        super().__init__(shape, torch.float32)
        self.num_bits, self.group_size = num_bits, group_size
        self.encoding: Encoding = 4 if num_bits == 3 else num_bits  # type: ignore[assignment]
        self.zero = 1.5 if num_bits == 2 else float(2 ** (num_bits - 1))
        groups = torch.empty(*shape[:-1], shape[-1] // group_size, dtype=torch.float32, device=device)
        self.scale = nn.Parameter(groups)

    @property
    def largest(self) -> float:
        """The outermost level, in scales."""
        return 2**self.num_bits - 1 - self.zero

    def empty(self, device: torch.device) -> Tensor:
        num_bytes = packed_length(self.shape[-1], number_of(self.encoding))
        return torch.empty(*self.shape[:-1], num_bytes, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales: of each group, those of least squared error among `SHARES` scales."""
        groups = weight.float().unflatten(-1, (-1, self.group_size))
        outermost = groups.abs().amax(-1, keepdim=True) / self.largest
        best = torch.full_like(outermost, torch.inf, dtype=torch.float64)
        scales = outermost.clone()
        # Exact shares and long sums: a checkpoint holds scales alone, so every processor must choose the same integers.
        for number in range(SHARES):
            tried = (1 - 0.8 * number / (SHARES - 1)) * outermost
            error = (self._levels(groups, tried) * tried - groups).square().sum(-1, keepdim=True, dtype=torch.float64)
            scales = torch.where(error < best, tried, scales)
            best = torch.minimum(error, best)
        codes = (self._levels(groups, scales) + self.zero).flatten(-2)
        return pack(codes.to(torch.uint8).contiguous(), self.encoding), scales.squeeze(-1)

    def _levels(self, groups: Tensor, scales: Tensor) -> Tensor:
        """The nearest level of each value, in scales."""
        shift = self.zero % 1
        relative = groups / scales.clamp(min=torch.finfo(torch.float32).tiny)
        return ((relative - shift).round() + shift).clamp(-self.largest, self.largest)

    def forward(self, kept: Tensor) -> Tensor:
        return _Scaled.apply(kept, self.scale, self.shape[-1], self.encoding, self.zero)  # type: ignore[no-any-return]

    def codes(self, weight: Tensor) -> Codes:
        values = unpack(weight, self.encoding, self.shape[-1])
        return Codes(values=values, encoding=self.encoding, scales=self.scale.detach(), zero=self.zero)

    def extra_repr(self) -> str:
        return f"{list(self.shape)} in {self.num_bits} bits, groups of {self.group_size}"


class _Scaled(torch.autograd.Function):
    """Nothing of the weight's size is kept for backward but its codes."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, scale: Tensor, num_in: int, encoding: Encoding, zero: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.settings = (num_in, encoding, zero, scale.shape[-1])
        levels = unpack(kept, encoding, num_in).to(scale.dtype) - zero
        return (levels.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (kept,), (num_in, encoding, zero, num_groups) = ctx.saved_tensors, ctx.settings
        levels = unpack(kept, encoding, num_in).to(grad.dtype) - zero
        return None, (grad * levels).unflatten(-1, (num_groups, -1)).sum(-1), None, None, None


def keep_integers(model: nn.Module) -> None:
    """Give every weight under `TrainedScales` the form that these decode.

    Raises:
        ConfigError: Another technique trains the weight, or would round it again.
    """
    for name, site in iter_sites(model):
        stage = site.stage(Slot.COMPACT)
        if not isinstance(stage, TrainedScales):
            continue
        rounding = site.stage(Slot.QUANT)
        if site.raw_weight.requires_grad or rounding is not None:
            other = (
                "another technique trains it" if rounding is None else f"{rounding.technique!r} would round it again"
            )
            raise ConfigError(
                f"peqa keeps {name} as integers, and {other}; remove one of the two from `techniques`, or give them "
                f"different `targets`"
            )
        owner, key = site.weight_at
        owner._parameters[key] = nn.Parameter(stage.empty(site.raw_weight.device), requires_grad=False)
