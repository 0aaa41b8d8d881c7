"""Configuration of N:M sparsity. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.site import Site
    from leanmill.core.sites import Sites


class NMSparsity(TechniqueConfig):
    """Keep the N largest of every M weights along the contraction dim (Zhou et al. 2021, arXiv:2102.04010).

    The mask is computed from the magnitudes at every forward and has no state. N counts weights that
    are *kept*, as in the paper; some pruning code counts zeros.
    """

    type: Literal["nm_sparsity"] = "nm_sparsity"
    """Name of the technique."""
    num_kept: int = Field(default=2, ge=1)
    """Weights kept of each group (N)."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Neighbours along the last dim in a group (M); it must divide that dim of every target."""
    gradient: Literal["straight_through", "sr_ste"] = "sr_ste"
    """`straight_through` hands the gradient of the masked weight to the dense one; `sr_ste` adds
    `decay` x the pruned weights to it."""
    decay: float = Field(default=2e-4, ge=0)
    """Pull of `sr_ste` on pruned weights (lambda in the paper), added once an optimizer step."""
    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    @model_validator(mode="after")
    def _keeps_fewer_than_all(self) -> NMSparsity:
        if self.num_kept >= self.group_size:
            raise ConfigError(
                f"num_kept {self.num_kept} of group_size {self.group_size} prunes nothing; "
                f"num_kept must be 1 to {self.group_size - 1}, or remove nm_sparsity"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask stage on every target.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target.
        """
        import torch

        from leanmill.sparse.nm_sparsity.stage import DecayOncePerStep, NMSparsityStage

        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            weight = site.raw_weight
            if weight.shape[-1] % self.group_size:
                raise ConfigError(
                    f"{site.site_name}: group_size {self.group_size} does not divide the last dim of its weight "
                    f"{list(weight.shape)}; add {site.site_name!r} to nm_sparsity.exclude or choose a "
                    f"group_size that divides {weight.shape[-1]}"
                )
        decay = self.decay if self.gradient == "sr_ste" else 0.0

        def stage(site: Site) -> NMSparsityStage:
            weight = site.raw_weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return NMSparsityStage(self.num_kept, self.group_size, decay, device=weight.device, dtype=dtype)

        sites.put(selected, stage)
        return Installation(step_rules=(DecayOncePerStep(sites.model),) if decay > 0 else ())
