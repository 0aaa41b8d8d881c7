"""Masks that are held, and moved by a step rule between steps; what all such techniques share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule, check_trained
from leanmill.core.site import Site
from leanmill.core.sites import changed_before, iter_stages
from leanmill.core.stage import Slot, Stage
from leanmill.core.views import View


class HeldMask(Stage):
    """Zero the weights [..., out, in] whose mask is off; the gradient passes to them too.

    Args:
        shape: Of the weight.
        device: Where the mask lives.
    """

    slot: ClassVar[Slot] = Slot.MASK
    mask: nn.Parameter
    """[..., out, in] bool, frozen, so that it is sharded and saved with the weight."""

    def __init__(self, shape: Iterable[int], *, device: torch.device | None = None) -> None:
        super().__init__()
        mask = torch.empty(tuple(shape), dtype=torch.bool, device=device)
        self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        return _Gate.apply(weight, self.mask)  # type: ignore[no-any-return]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.mask.fill_(True)


class _Gate(torch.autograd.Function):
    """Masked in forward; the gradient of the masked weight is that of the dense one, which rules look at."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class HeldMaskRule(StepRule):
    """Keeps masked weights at rest.

    Every step gradients of masked weights are zeroed before clipping, so neither the norm nor the optimizer
    sees them. As their value and moments are 0 too, no element-wise optimizer moves them.

    Args:
        model: Walked anew every step.
    """

    stage_type: ClassVar[type[HeldMask]]

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def check(self) -> None:
        for site, _ in self.masks():
            check_trained(self.name, site.site_name, site.raw_weight.requires_grad)
            before = changed_before(site, Slot.MASK)
            if before is not None:
                raise ConfigError(
                    f"{self.name} zeroes entries of {site.site_name}, which {before!r} changes before the mask; "
                    f"remove one of the two techniques, or add {site.site_name!r} to {self.name}.exclude"
                )

    def before_optimizer(self, context: StepContext) -> None:
        for site, weight, mask in self.views(context):
            if context.step == 0:
                weight.value.masked_fill_(~mask.value, 0)
            gradient = weight.grad
            if gradient is None:
                continue
            self.look(site, weight, mask, gradient, context)
            # A product, not a fill: what is not finite stays so, and the step is skipped.
            gradient.mul_(mask.value)

    @abstractmethod
    def look(self, site: Site, weight: View, mask: View, gradient: Tensor, context: StepContext) -> None:
        """See the dense gradient of a weight before it is masked."""

    def masks(self) -> Iterator[tuple[Site, Any]]:
        """See `iter_stages`."""
        return iter_stages(self.model, self.stage_type)

    def views(self, context: StepContext) -> Iterator[tuple[Site, View, View]]:
        """Yield each site with the views of its weight and, beside that, of its mask."""
        assert context.views is not None
        for site, stage in self.masks():
            weight = context.views.of(site.raw_weight)  # type: ignore[arg-type]
            yield site, weight, weight.beside(stage.mask)


def write_mask(weight: View, mask: View, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Write a new mask; what is not on before and after gets value and optimizer state 0. To be published.

    Returns:
        How many of the piece are on, and how many of them were not before.
    """
    stays = moved & mask.value
    for tensor in (weight.value, *weight.states().values()):
        tensor.masked_fill_(~stays, 0)
    mask.value.copy_(moved)
    num_active = moved.sum()
    return num_active, num_active - stays.sum()
