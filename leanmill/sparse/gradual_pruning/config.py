"""Configuration of gradual pruning. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext
from leanmill.sparse.units import UnitsConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class GradualPruning(UnitsConfig):
    """Prune more and more while training (GMP: Zhu and Gupta 2017, arXiv:1710.01878).

    The share of pruned weights grows between `begin` and `end`. What is pruned stays so, and masks rest after `end`.
    """

    type: Literal["gradual_pruning"] = "gradual_pruning"
    """Name of the technique."""
    sparsity: float = Field(default=0.8, gt=0, lt=1)
    """Share of the targeted weights pruned in the end (s_f)."""
    initial_sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Share pruned at once at `begin` (s_i)."""
    begin: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run, from its start, that is dense."""
    end: float = Field(default=0.75, gt=0, le=1)
    """Share of the run after which `sparsity` is reached; what is left recovers."""
    update_every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between updates; the last one comes at `end`."""
    growth: Literal["cubic", "geometric"] = "cubic"
    """How the share grows, x from 0 to 1 between `begin` and `end`: `cubic` as s_f + (s_i - s_f) (1 - x)^3, fast at
    first; `geometric` so that every update leaves the same share of what the one before left, 1 - s = (1 - s_i)^(1 - x)
    (1 - s_f)^x, as Anytime Progressive Pruning does (Misra et al. 2022, arXiv:2204.01640)."""
    criterion: Literal["magnitude", "gradient", "fisher", "movement"] = "magnitude"
    """What is pruned first: the smallest |w|, |w g| of the step's gradient g, |w| sqrt(F) with the diagonal F of
    the Fisher matrix as AdamW's second moments have it, which orders weights as w^2 F does, or the sum of -w g over
    the run so far, least where gradients move w towards zero (Sanh et al. 2020); units by the mean."""

    @model_validator(mode="after")
    def _fits_together(self) -> GradualPruning:
        if self.begin >= self.end:
            raise ConfigError(
                f"gradual_pruning.begin {self.begin:g} is not before end {self.end:g}; set begin below {self.end:g}"
            )
        if self.initial_sparsity >= self.sparsity:
            raise ConfigError(
                f"gradual_pruning.initial_sparsity {self.initial_sparsity:g} is not below sparsity {self.sparsity:g}, "
                f"which it grows to; lower it"
            )
        return self

    def reads_optimizer_state(self) -> bool:
        """Moments of pruned weights are zeroed."""
        return True

    def reads_second_moments(self) -> str | None:
        """The diagonal of the Fisher matrix is read off them; sums over the run stand beside them."""
        is_of_adamw = self.criterion in ("fisher", "movement")
        return "gradual_pruning.criterion=magnitude" if is_of_adamw else None

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask on every target.

        Raises:
            ConfigError: Blocks do not divide a target, or a layer would have nothing left.
        """
        from leanmill.core.parameters import ParamRule, ParamSettings
        from leanmill.sparse.gradual_pruning.rule import PruneGradually
        from leanmill.sparse.gradual_pruning.stage import GradualMask
        from leanmill.sparse.schedule import GrowingSparsity, Interval
        from leanmill.sparse.scores import CRITERIA

        selected, unit = sites.select(self.targets, self.exclude), self.unit()
        for site in selected:
            self.check_target(site.site_name, tuple(site.raw_weight.shape), self.sparsity)
        sites.put(selected, lambda site: GradualMask(site.raw_weight.shape, device=site.raw_weight.device))
        schedule = GrowingSparsity(
            initial=self.initial_sparsity,
            final=self.sparsity,
            interval=Interval(begin=self.begin, end=self.end),
            every_steps=self.update_every_steps,
            growth=self.growth,
        )
        criterion = CRITERIA[self.criterion]
        rule = PruneGradually(sites.model, schedule, criterion, unit, self.scope)
        if not criterion.adds_up:
            return Installation(step_rules=(rule,))
        names = frozenset(site.weight_name for site in selected)
        summed = ParamRule(technique=self.type, match=names.__contains__, settings=ParamSettings(pull="kept"))
        return Installation(step_rules=(rule,), param_rules=(summed,))
