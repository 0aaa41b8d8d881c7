"""Looking at every router of a model."""

from __future__ import annotations

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.loads.loads import loads_of
from leanmill.moe.moe_metrics.histogram import ExpertHistogram
from leanmill.moe.moe_metrics.rule import ExpertMetrics
from leanmill.moe.moe_metrics.watch import NUM_SUMS, RouterWatch, Shown
from leanmill.moe.routing.install import decisions


def watch_routers(sites: Sites, context: InstallContext, *, by_layer: bool) -> tuple[ExpertMetrics, ExpertHistogram]:
    """Look at every router of the model; return what reports training steps and what counts held-out text.

    Raises:
        ConfigError: The model has no routers, ones whose output is not understood, or another entry looks at them.
    """
    loads, shown, watches = loads_of(sites, context), Shown(), []
    for layer, (place, decision) in zip(loads.layers, decisions(sites, context.ledger, decide=False), strict=True):
        if RouterWatch.technique in decision.readers:
            raise ConfigError("moe_metrics is listed twice; keep one entry")
        watch = RouterWatch(layer, loads.open(f"router/{place.name}", NUM_SUMS), shown)
        decision.tell(watch)
        watches.append(watch)
    return ExpertMetrics(loads, watches, by_layer=by_layer), ExpertHistogram(watches, shown)
