"""When a mask has settled, and drawing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.rules import StepContext
from leanmill.core.site import Site
from leanmill.core.views import View
from leanmill.sparse.early_ticket.stage import TicketMask
from leanmill.sparse.held import HeldMask, HeldMaskRule, write_mask
from leanmill.sparse.scores import magnitude
from leanmill.sparse.units import Scope, Scored, Unit, choose


class DrawTicket(HeldMaskRule):
    """Finds the mask of the largest weights now and then, and draws it once it hardly changes.

    Masks are found after the optimizer's step; one whose gradients are not finite moves nothing, and is passed over.

    Args:
        model: Walked anew every step.
        unit: What is pruned as one.
        scope: What is compared with what.
        sparsity: Share of units that the ticket leaves out.
        every_steps: Between two masks.
        num_masks: That must agree.
        tolerance: Share of weights in which the newest may differ from each of the others.
        latest: Share of the run after which the ticket is drawn in any case.
    """

    name = "early_ticket"
    stage_type: ClassVar[type[HeldMask]] = TicketMask

    def __init__(
        self,
        model: nn.Module,
        unit: Unit,
        scope: Scope,
        *,
        sparsity: float,
        every_steps: int,
        num_masks: int,
        tolerance: float,
        latest: float,
    ) -> None:
        super().__init__(model)
        self.unit, self.scope, self.sparsity = unit, scope, sparsity
        self.every_steps, self.num_masks, self.tolerance, self.latest = every_steps, num_masks, tolerance, latest
        self._num_found = 0
        self._drawn_at: int | None = None
        """The step; 0 is the first."""
        self._distance: float | None = None

    def look(self, site: Site, weight: View, mask: View, gradient: Tensor, context: StepContext) -> None:
        """Nothing: magnitudes decide."""

    def after_optimizer(self, context: StepContext) -> None:
        is_last = context.step + 1 >= self.latest * context.num_steps
        is_due = is_last or (context.step + 1) % self.every_steps == 0
        if self._drawn_at is not None or not is_due or bool(context.skipped):
            return
        layers = [Scored(weight, mask, magnitude(weight)) for _, weight, mask in self.views(context)]
        found = choose(layers, self.unit, self.sparsity, self.scope)
        distances = self._remember(layers, found, context)
        known = distances[: min(self._num_found, self.num_masks - 1)]
        self._num_found += 1
        self._distance = max(known, default=1.0)
        has_settled = len(known) == self.num_masks - 1 and self._distance <= self.tolerance
        if is_last or has_settled:
            self._draw(layers, found, context)

    def _remember(self, layers: Sequence[Scored], found: Sequence[Tensor], context: StepContext) -> list[float]:
        """Note masks down; return how far they are from each of those before, the last one first."""
        assert context.views is not None
        counts, histories = torch.zeros(self.num_masks - 1, dtype=torch.int64), []
        for (_, stage), layer, mask in zip(self.masks(), layers, found, strict=True):
            history = layer.weight.beside(stage.history)
            before = history.value.view(mask.shape)
            bits = [(before >> age & 1).bool() != mask for age in range(self.num_masks - 1)]
            counts += layer.weight.reduce(torch.stack([differs.sum() for differs in bits]), "sum").cpu()
            history.value.copy_((before << 1 | mask).view(history.value.shape))
            histories.append(history)
        context.views.publish(histories)
        total = sum(layer.weight.numel for layer in layers)
        return [count / total for count in counts.tolist()]

    def _draw(self, layers: Sequence[Scored], found: Sequence[Tensor], context: StepContext) -> None:
        assert context.views is not None
        for layer, mask in zip(layers, found, strict=True):
            write_mask(layer.weight, layer.mask, mask)
        context.views.publish([view for layer in layers for view in (layer.weight, layer.mask)])
        self._drawn_at = context.step

    def state_dict(self) -> dict[str, Any]:
        if not self._num_found:
            return {}
        return {"num_found": self._num_found, "drawn_at": self._drawn_at, "distance": self._distance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._num_found, self._drawn_at, self._distance = state["num_found"], state["drawn_at"], state["distance"]

    def metrics(self) -> Mapping[str, float]:
        drawn = {} if self._drawn_at is None else {"drawn_after_steps": float(self._drawn_at + 1)}
        return drawn if self._distance is None else {"distance": self._distance} | drawn
