"""What stands around a norm whose output is scaled."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.around import Around, Call, Ring
from leanmill.core.errors import ConfigError


class ScaledNorm(Around):
    """Multiplies what a norm returns by a constant.

    Args:
        name: Of the norm, for messages.
        factor: The constant, above 0.
        starts_folded: Whether weights that are loaded have the factor in them already.
    """

    technique: ClassVar[str] = "layernorm_scaling"
    ring: ClassVar[Ring] = Ring.SCALE

    factor: Tensor
    """fp32 (1,); a buffer, since a number would give every layer a compiled graph of its own."""

    def __init__(self, name: str, factor: float, *, starts_folded: bool = False) -> None:
        super().__init__()
        self.name, self.starts_folded = name, starts_folded
        # Not on meta, where it would lose its value.
        self.register_buffer("factor", torch.full((1,), factor, device="cpu"), persistent=False)

    def forward(self, call: Call, /, *args: object, **kwargs: object) -> Tensor:
        """Return the norm's output [..., H], scaled in fp32 and rounded once, in its dtype."""
        output: Tensor = call(*args, **kwargs)
        return (output * self.factor).to(output.dtype)

    def fold(self, module: nn.Module) -> None:
        """Scale the norm's own weight and bias."""
        scale_norm(module, float(self.factor), self.name)

    def unfold(self, module: nn.Module) -> None:
        """Take the factor out of the norm's own weight and bias."""
        scale_norm(module, 1 / float(self.factor), self.name)

    @property
    def unfolds(self) -> bool:
        return self.starts_folded


@torch.no_grad()
def scale_norm(norm: nn.Module, factor: float, name: str) -> None:
    """Multiply what a norm returns by `factor`, through its weight w and bias b, in place.

    Norms multiply by c + w: c is 0 for most, 1 for those that start from w = 0, and then factor x (c + w) - c
    is the new weight. What c is, the norm shows on an input.

    Args:
        norm: Computes n(x) (c + w) + b; plain, in fp32 on the CPU.
        factor: Above 0.
        name: For the message.

    Raises:
        ConfigError: It has no weight, or computes something else.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, nn.Parameter):
        raise ConfigError(
            f"{name} has no weight that could take layernorm_scaling's factor, so no plain model of this family "
            f"computes what was trained; remove layernorm_scaling, or choose another family, e.g. llama"
        )
    x = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype).square() + torch.tensor([[0.1], [1.7]])
    expected = factor * _plain(norm, x)
    shift = _shift(norm, weight, bias, x)
    weight.mul_(factor).add_(shift * (factor - 1))
    if isinstance(bias, nn.Parameter):
        bias.mul_(factor)
    if not torch.allclose(_plain(norm, x), expected, rtol=1e-5, atol=1e-6):
        raise ConfigError(
            f"{name} is no norm that layernorm_scaling knows how to scale; choose another family, e.g. llama"
        )


def _plain(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm without what stands around it."""
    return type(norm).forward(norm, x)  # type: ignore[no-any-return]


def _shift(norm: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor) -> float:
    """Return c, from what the norm makes of x with weights of 0 and of 1, without bias."""
    kept = [(p, p.clone()) for p in (weight, bias) if p is not None]
    if bias is not None:
        bias.zero_()
    at_zero, at_one = (_plain(norm, x) if weight.fill_(value) is weight else x for value in (0.0, 1.0))
    for parameter, value in kept:
        parameter.copy_(value)
    steps = (at_one - at_zero).abs()
    return round(float((at_zero.abs() / steps.clamp(min=1e-12)).median()))
