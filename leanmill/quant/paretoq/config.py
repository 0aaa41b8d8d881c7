"""Configuration of ParetoQ. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig, WeightTechniqueConfig
from leanmill.quant.config import Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites

BITS = (1, 1.58, 2, 3, 4)


class ParetoQ(TrainedTechniqueConfig, Warmup, WeightTechniqueConfig):
    """Weights of 1 to 4 bits with one trained scale a row (ParetoQ: Liu et al. 2025, arXiv:2502.02631).

    1 bit: signs (elastic binarisation). 1.58 and 2 bits: levels that share the range from -alpha to alpha evenly,
    {-2/3, 0, 2/3} and {-3/4, -1/4, 1/4, 3/4} times alpha (stretched elastic quantisation). 3 and 4 bits: LSQ's.
    """

    type: Literal["paretoq"] = "paretoq"
    """Name of the technique."""
    weight_bits: float = Field(default=2)
    """Bits of a weight: 1, 1.58, 2, 3 or 4."""

    @field_validator("weight_bits")
    @classmethod
    def _has_a_grid(cls, value: float) -> float:
        if value not in BITS:
            raise ConfigError(
                f"paretoq.weight_bits={value:g} has no grid in the paper; set 1, 1.58, 2, 3 or 4, or use lsq for 5 to 8"
            )
        return value

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser with scales of its own on every target."""
        from leanmill.quant.paretoq.stage import make_stage
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        sites.put(selected, lambda site: make_stage(site.raw_weight, self.weight_bits, has_warmup=self.has_warmup))
        return Installation(step_rules=warmup_rules(sites, self.type, self.warmup_steps))
