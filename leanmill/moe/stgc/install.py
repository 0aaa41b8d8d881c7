"""Standing by every router and around the module whose output is that of its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.core.account import Account
from leanmill.core.around import Around, Call, Ring
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.rules import StepRule
from leanmill.core.sites import Sites
from leanmill.moe.routing.decision import Decision, Reader, Routing
from leanmill.moe.routing.install import decisions
from leanmill.moe.stgc.conflicts import Eliminate


_TECHNIQUE = "stgc"


class SeenRouting(Reader):
    """Keeps what a router decided until its experts have returned."""

    technique = _TECHNIQUE

    def __init__(self) -> None:
        super().__init__()
        self.routing: tuple[Tensor, Tensor, Tensor] | None = None
        """Logits, combine weights, experts; as experts see them."""

    @property
    def is_looking(self) -> bool:
        return self.training

    def forward(self, routing: Routing) -> Tensor:
        experts = routing.experts
        if routing.is_kept is not None:
            experts = experts.masked_fill(~routing.is_kept, routing.logits.shape[-1])
        self.routing = routing.logits, routing.weights.detach(), experts
        return routing.weights


class Mixture(Around):
    """Lets the gradient of what a mixture of experts returns find the tokens that conflict.

    Args:
        seen: Of its router.
        loss: Account of the conflict elimination loss.
        share: Account of the share of copies that conflict.
        threshold: See `Stgc`.
        is_global: Whether an expert's mean gradient is over all ranks.
    """

    technique = _TECHNIQUE
    ring = Ring.TAP
    seen: SeenRouting

    def __init__(self, seen: SeenRouting, loss: Account, share: Account, *, threshold: float, is_global: bool) -> None:
        super().__init__()
        self.__dict__["seen"] = seen  # a part of the router
        self.loss, self.share, self.threshold, self.is_global = loss, share, threshold, is_global

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        routing, self.seen.routing = self.seen.routing, None
        if routing is None or not (self.training and torch.is_grad_enabled()):
            return output
        mixed, *rest = output if isinstance(output, tuple) else (output,)
        scale, factor = self.loss.scales.micro_batch, self.loss.factor
        sums = self.loss.sums, self.share.sums
        mixed = Eliminate.apply(mixed, *routing, scale, factor, *sums, self.threshold, self.is_global)
        return (mixed, *rest) if isinstance(output, tuple) else mixed


class TrainedRouters(StepRule):
    """Refuses routers that something froze.

    Args:
        routers: Their decisions, by name.
    """

    name = _TECHNIQUE

    def __init__(self, routers: dict[str, Decision]) -> None:
        self._routers = routers

    def check(self) -> None:
        for name, decision in self._routers.items():
            if not any(parameter.requires_grad for parameter in decision.module.parameters()):
                raise ConfigError(
                    f"stgc moves the router {name}, but another technique freezes it; remove stgc, or the technique "
                    f"that freezes (such as lora)"
                )


def eliminate_conflicts(
    sites: Sites, ledger: Ledger, *, weight: float, threshold: float, is_global: bool
) -> TrainedRouters:
    """Stand around every mixture of experts; the loss is a mean over layers. See `Stgc` for the arguments.

    Raises:
        ConfigError: See `Stgc.install`; or another entry stands there.
    """
    found, blocks = decisions(sites, ledger), sites.modules("mlp")
    for index, (place, decision) in enumerate(found):
        if _TECHNIQUE in decision.readers:
            raise ConfigError("stgc is listed twice; keep one entry")
        holders = [block for block in blocks if any(module is place.module for module in block.module.modules())]
        if not holders:
            raise ConfigError(
                f"stgc needs the output of the experts that {place.name} chooses, and does not find which module "
                f"returns it; choose another family, e.g. mixtral"
            )
        layer = index if place.layer is None else place.layer
        seen = SeenRouting()
        decision.tell(seen)
        holders[0].around(
            Mixture(
                seen,
                ledger.open(f"{_TECHNIQUE}/{layer}", per="micro_batch", weight=weight / len(found)),
                ledger.open(f"{_TECHNIQUE}_share/{layer}", per="micro_batch", weight=0.0),
                threshold=threshold,
                is_global=is_global,
            )
        )
    return TrainedRouters({place.name: decision for place, decision in found})
