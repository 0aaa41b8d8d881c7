"""Configuration of gradual pruning. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext
from leanmill.sparse.units import UnitsConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites
    from leanmill.sparse.gradual_pruning.rule import PruneGradually


_OF_MFAC = ("mfac_gradients", "mfac_block_size", "mfac_damping")


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
    criterion: Literal["magnitude", "gradient", "fisher", "movement", "mfac"] = "magnitude"
    """What is pruned first: the smallest |w|, |w g| of the step's gradient g, |w| sqrt(F) with the diagonal F of
    the Fisher matrix as AdamW's second moments have it, which orders weights as w^2 F does, or the sum of -w g over
    the run so far, least where gradients move w towards zero (Sanh et al. 2020); units by the mean. `mfac`: w^2 /
    [F^-1]_ii, F the Fisher matrix that the gradients of the last steps show among neighbours, and the weights that stay
    make up for those that go (M-FAC, Frantar et al. 2021, arXiv:2107.03356); weights alone."""
    mfac_gradients: int = Field(default=16, ge=1, le=1024)
    """For `mfac`: of how many last steps gradients are kept, 4 bytes a weight each in the optimizer's state."""
    mfac_block_size: int = Field(default=128, ge=1)
    """For `mfac`: neighbours in a row that are looked at together; the last ones of a row may be fewer."""
    mfac_damping: float = Field(default=0.01, gt=0)
    """For `mfac`: added to the diagonal of the Fisher matrix, as a share of its mean over the layer."""

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
        changed = [name for name in _OF_MFAC if getattr(self, name) != type(self).model_fields[name].default]
        if changed and self.criterion != "mfac":
            raise ConfigError(
                f"gradual_pruning: {changed[0]} is for criterion: mfac; remove it, or type criterion: mfac"
            )
        if self.criterion == "mfac" and self.pattern != "unstructured":
            raise ConfigError(
                f"gradual_pruning: mfac scores and moves single weights; type pattern: unstructured, or another "
                f"criterion for pattern: {self.pattern}, e.g. fisher"
            )
        return self

    def reads_optimizer_state(self) -> bool:
        """Moments of pruned weights are zeroed."""
        return True

    def reads_second_moments(self) -> str | None:
        """The diagonal of the Fisher matrix is read off them; sums over the run stand beside them."""
        is_of_adamw = self.criterion in ("fisher", "movement", "mfac")
        return "gradual_pruning.criterion=magnitude" if is_of_adamw else None

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask on every target.

        Raises:
            ConfigError: Blocks do not divide a target, or a layer would have nothing left.
        """
        from leanmill.core.parameters import ParamRule, ParamSettings
        from leanmill.sparse.gradual_pruning.stage import GradualMask

        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            self.check_target(site.site_name, tuple(site.raw_weight.shape), self.sparsity)
        sites.put(selected, lambda site: GradualMask(site.raw_weight.shape, device=site.raw_weight.device))
        rule, num_kept = self._rule(sites)
        if not num_kept:
            return Installation(step_rules=(rule,))
        names = frozenset(site.weight_name for site in selected)
        kept = ParamRule(technique=self.type, match=names.__contains__, settings=ParamSettings(kept=num_kept))
        return Installation(step_rules=(rule,), param_rules=(kept,))

    def _rule(self, sites: Sites) -> tuple[PruneGradually, int]:
        """Return what prunes, and how many tensors like each weight it keeps in the optimizer's state."""
        from leanmill.sparse.gradual_pruning.curvature import Curvature, PruneByCurvature
        from leanmill.sparse.gradual_pruning.rule import PruneGradually
        from leanmill.sparse.schedule import GrowingSparsity, Interval
        from leanmill.sparse.scores import CRITERIA

        schedule = GrowingSparsity(
            initial=self.initial_sparsity,
            final=self.sparsity,
            interval=Interval(begin=self.begin, end=self.end),
            every_steps=self.update_every_steps,
            growth=self.growth,
        )
        if self.criterion == "mfac":
            curvature = Curvature(
                num_gradients=self.mfac_gradients, block_size=self.mfac_block_size, damping=self.mfac_damping
            )
            return PruneByCurvature(sites.model, schedule, self.scope, curvature), self.mfac_gradients
        criterion = CRITERIA[self.criterion]
        return PruneGradually(sites.model, schedule, criterion, self.unit(), self.scope), int(criterion.adds_up)
