"""Configuration of bidirectional N:M pruning. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Bdwp(WeightTechniqueConfig):
    """N:M masks of their own for both matmuls with a weight (BDWP: Fang et al. 2023, arXiv:2309.13015).

    Forward keeps N of M neighbours along the inputs, which its matmul sums over; the gradient of the
    input is taken with N of M along the outputs, which that matmul sums over. The gradient of the
    weight is dense and passes straight through.
    """

    type: Literal["bdwp"] = "bdwp"
    """Name of the technique."""
    num_kept: int = Field(default=2, ge=1)
    """Weights kept of each group (N)."""
    group_size: int = Field(default=8, ge=2, le=64)
    """Neighbours in a group (M), 8 in the paper; it must divide both dims of every target."""

    @model_validator(mode="after")
    def _keeps_fewer_than_all(self) -> Bdwp:
        if self.num_kept >= self.group_size:
            raise ConfigError(
                f"num_kept {self.num_kept} of group_size {self.group_size} prunes nothing; "
                f"num_kept must be 1 to {self.group_size - 1}, or remove bdwp"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put both masks on every target.

        Raises:
            ConfigError: `group_size` does not divide a dim of a target.
        """
        from leanmill.sparse.bdwp.stage import BdwpStage

        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            shape = site.raw_weight.shape
            if shape[-1] % self.group_size or shape[-2] % self.group_size:
                raise ConfigError(
                    f"{site.site_name}: group_size {self.group_size} does not divide both dims of its weight "
                    f"{list(shape)}; add {site.site_name!r} to bdwp.exclude or choose a group_size that divides both"
                )
        for site in selected:
            site.put(BdwpStage(self.num_kept, self.group_size))
        return Installation()
