"""The numbers of a step, from sums over its tokens that all ranks have reduced already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from leanmill.core.rules import StepContext, StepRule
from leanmill.moe.load_statistics import load_entropy, max_violation, num_dead
from leanmill.moe.loads.loads import Loads
from leanmill.moe.moe_metrics.watch import Looks, RouterWatch


NAME = "experts"


class ExpertMetrics(StepRule):
    """Reports what the last step's tokens did; no collective and no waiting but when a record is due.

    After a step that nobody knew to be reported there is nothing to report.

    Args:
        loads: Of the run.
        looks: Of the model.
        watches: Of all routers.
        by_layer: Whether to report each layer.
    """

    name = NAME

    def __init__(self, loads: Loads, looks: Looks, watches: Sequence[RouterWatch], *, by_layer: bool) -> None:
        self._loads, self._looks, self._watches, self._by_layer = loads, looks, watches, by_layer

    def begin_step(self, context: StepContext) -> None:
        self._looks.begin_step(is_due=context.is_reported)

    def metrics(self) -> Mapping[str, float]:
        """Return means over layers (`dead_experts`: the number in all), and those of each layer as `name/layer`."""
        step = self._loads.last_step
        if step is None or not self._looks.is_due:
            return {}
        step = step.cpu()  # all that follows is the host's
        found: dict[str, dict[int, float]] = {}
        for watch in self._watches:
            counts = self._loads.part(step, watch.router.counts).tolist()
            sums = self._loads.part(step, watch.sums).tolist()
            for name, value in of_layer(counts, sums).items():
                found.setdefault(name, {})[watch.router.layer] = value
        totals = {
            name: sum(layers.values()) / (1 if name == "dead_experts" else len(layers))
            for name, layers in found.items()
        }
        if not self._by_layer:
            return totals
        return totals | {f"{name}/{layer}": v for name, layers in found.items() for layer, v in layers.items()}


def of_layer(counts: Sequence[float], sums: Sequence[float]) -> dict[str, float]:
    """Return the metrics of one layer.

    Args:
        counts: [E] how often each expert was chosen.
        sums: As `watch.look` returns them.

    Returns:
        `max_violation`, `load_entropy`, `dead_experts`; `drop_rate`, the share of choices that no expert computed;
        `router_entropy`, the mean entropy of a token's shares of affinity over that of equal ones; `logit_scale`,
        the root mean square of logits.
    """
    entropy, square, dropped, num_tokens = sums
    most = math.log(len(counts)) if len(counts) > 1 else 1.0
    return {
        "max_violation": max_violation(counts),
        "load_entropy": load_entropy(counts),
        "dead_experts": float(num_dead(counts)),
        "drop_rate": dropped / max(sum(counts), 1),
        "router_entropy": entropy / max(num_tokens, 1) / most,
        "logit_scale": math.sqrt(square / max(num_tokens, 1)),
    }
