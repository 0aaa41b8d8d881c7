"""Looking at every router of a model."""

from __future__ import annotations

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.loads.loads import loads_of
from leanmill.moe.moe_metrics.histogram import ExpertHistogram
from leanmill.moe.moe_metrics.rule import ExpertMetrics
from leanmill.moe.moe_metrics.watch import NUM_SUMS, Looks, RouterWatch, Shown
from leanmill.moe.routing.install import decisions


def watch_routers(sites: Sites, context: InstallContext, *, by_layer: bool) -> tuple[ExpertMetrics, ExpertHistogram]:
    """Look at every router of the model; return what reports training steps and what counts held-out text.

    Raises:
        ConfigError: The model has no routers, ones whose output is not understood, or another entry looks at them.
    """
    loads, looks, shown = loads_of(sites, context, only_reported=True), Looks(), Shown()
    watches: list[RouterWatch] = []
    for layer, (place, decision) in zip(loads.layers, decisions(sites, context.ledger, decide=False), strict=True):
        if RouterWatch.technique in decision.readers:
            raise ConfigError("moe_metrics is listed twice; keep one entry")
        watch = RouterWatch(layer, loads.open(f"router/{place.name}", NUM_SUMS), looks, shown)
        decision.tell(watch)
        watches.append(watch)
    context.ledger.before_forward(looks.begin_forward)
    loads.complete_by(looks.look)
    return ExpertMetrics(loads, looks, watches, by_layer=by_layer), ExpertHistogram(watches, shown)
