"""Starting adapters from the gradient of the first batch: LoRA-SB's start, inside the run and under every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.views import Views, part_of
from leanmill.parallel.collectives import sum_over_ranks


if TYPE_CHECKING:
    from leanmill.peft_ext.tuners.core_lora import CoreLoraLayer


class GradientStart(StepRule):
    """Spends the first optimizer step on the gradients of the wrapped weights, and starts the adapters from them.

    In that step adapters are zero and without gradient. Each layer adds up its weight's gradient, whole, in fp32, over
    micro-batches; ranks are summed; every rank decomposes all of them alike. From the next step on the gradients are
    gone.

    Args:
        model: Walked anew every time.
        step_size: eta of the step -eta sign(gradient) that is decomposed.

    A gradient that is not finite ends the run with RunError, `train.non_finite: skip` or not: adapters of zeros would
    never move.
    """

    name = "lora_sb"

    def __init__(self, model: nn.Module, step_size: float) -> None:
        self.model, self.step_size = model, step_size

    def begin_step(self, context: StepContext) -> None:
        for layer in self._layers():
            layer.collect(context.step == 0 and context.views is not None)

    def before_optimizer(self, context: StepContext) -> None:
        if context.step > 0 or context.views is None:
            return
        for layer in self._layers():
            gradient = sum_over_ranks(layer.collected())
            layer.collect(False)
            if not torch.isfinite(gradient).all():
                raise RunError(
                    "non-finite gradient in the first step, which lora_sb starts its adapters from; look at the data "
                    "and at model.path, or use variant: lora_xs"
                )
            start = layer.start_of_gradient(gradient, self.step_size)
            _write(context.views, dict(zip(layer.parameters_in_order(), start, strict=True)))

    def replaces_optimizer(self, context: StepContext) -> bool:
        return context.step == 0

    def _layers(self) -> list[CoreLoraLayer]:
        from leanmill.peft_ext.tuners.core_lora import CoreLoraLayer

        return [module for module in self.model.modules() if isinstance(module, CoreLoraLayer)]


@torch.no_grad()
def _write(views: Views, values: dict[nn.Parameter, Tensor]) -> None:
    """Write whole tensors into what each rank holds of parameters, and bring them to the next forward."""
    found = []
    for parameter, value in values.items():
        view = views.of(parameter)
        view.value.copy_(part_of(view, value))
        found.append(view)
    views.publish(found)
