"""Configuration of what is logged of experts. Imports no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from torch import nn

    from leanmill.core.sites import Sites

log = logging.getLogger(__name__)


class MoeMetrics(TechniqueConfig):
    """Log how evenly experts are loaded, how sure routers are, and how much domains differ in their experts.

    Installed unasked on models with routers, unless `log.watch` is false.
    """

    type: Literal["moe_metrics"] = "moe_metrics"
    """Name of the technique."""
    by_layer: bool = True
    """Log each layer's numbers beside their mean."""

    def watches(self, model: nn.Module) -> bool:
        """Whether the model has routers, all of a form that is understood."""
        from leanmill.core.places import find_modules
        from leanmill.moe.routing.install import check_routers

        if next(find_modules(model, "router"), None) is None:
            return False
        try:
            check_routers(model)
        except ConfigError as error:
            log.info("experts are not watched: %s", error)
            return False
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Look at every router."""
        from leanmill.moe.moe_metrics.install import watch_routers

        rule, probe = watch_routers(sites, context, by_layer=self.by_layer)
        return Installation(step_rules=(rule,), probes=(probe,))
