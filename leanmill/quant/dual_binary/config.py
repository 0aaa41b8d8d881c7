"""Configuration of dual binarisation. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig
from leanmill.quant.config import SharedScales, Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class DualBinary(TrainedTechniqueConfig, Warmup, SharedScales):
    """Weights of 2 bits as two binaries, alpha1 b1 + alpha2 b2 with b in {0, 1} and both alphas trained.

    The flexible dual binarisation of DB-LLM (Chen et al. 2024, arXiv:2402.11960). The levels are 0, alpha1, alpha2 and
    their sum, and start as -s, 0, s and 2s. Scales get no weight decay unless told.
    """

    type: Literal["dual_binary"] = "dual_binary"
    """Name of the technique."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser with scales of its own on every target.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target.
        """
        from leanmill.quant.dual_binary.stage import DualStage
        from leanmill.quant.scales import check_groups
        from leanmill.quant.sharing import Sharing
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        check_groups(selected, self.type, self.group_size)
        sharing = Sharing(self.granularity, self.group_size)
        sites.put(selected, lambda site: DualStage(site.raw_weight, sharing, has_warmup=self.has_warmup))
        return Installation(step_rules=warmup_rules(sites, self.type, self.warmup_steps))
