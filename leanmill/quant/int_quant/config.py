"""Configuration of integer quantisation with scales taken from the values. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext
from leanmill.quant.config import SharedScales, Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class IntQuant(Warmup, SharedScales):
    """Weights, and activations if asked, on a symmetric integer grid, trained straight-through.

    The scale is computed from the values at every forward: quantisation-aware training as in Jacob et
    al. 2018 (arXiv:1712.05877), with signed symmetric codes.
    """

    type: Literal["int_quant"] = "int_quant"
    """Name of the technique."""
    weight_bits: int = Field(default=4, ge=2, le=8)
    """Bits b of a weight; codes are -(2^(b-1) - 1) to 2^(b-1) - 1."""
    activation_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of an activation, one absmax scale a token; None leaves activations alone."""
    scale: Literal["absmax", "mse"] = "absmax"
    """Of weights. `absmax`: the largest magnitude is the outermost code. `mse`: of 40 shares of that
    scale, from 1 down to 0.22, the one with the least squared error; about 40 times the work."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser on every target, and one on its input.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target.
        """
        from leanmill.quant.int_quant.stage import IntActivations, IntWeights
        from leanmill.quant.scales import check_groups
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        check_groups(selected, self.type, self.group_size)
        sites.put(
            selected,
            lambda site: IntWeights(
                self.weight_bits, self.scale, self.granularity, self.group_size,
                has_warmup=self.has_warmup, device=site.raw_weight.device,
            ),
        )  # fmt: skip
        if self.activation_bits is not None:
            for site in selected:
                device = site.raw_weight.device
                site.put_input(IntActivations(self.activation_bits, has_warmup=self.has_warmup, device=device))
        return Installation(step_rules=warmup_rules(sites, self.type, self.warmup_steps))
