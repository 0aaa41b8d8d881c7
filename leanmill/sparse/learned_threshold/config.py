"""Configuration of learned thresholds. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class LearnedThresholdConfig(TrainedTechniqueConfig, WeightTechniqueConfig):
    """Prune what lies below a threshold of its row, which is trained (DST: Liu et al. 2020, arXiv:2005.06870).

    Thresholds start at 0, where nothing is pruned, and are pushed up by a regulariser; the loss holds against it, so
    every layer finds its own sparsity, and weights come back. No share is asked for.
    """

    type: Literal["learned_threshold"] = "learned_threshold"
    """Name of the technique."""
    push: float = Field(default=1e-5, gt=0)
    """Factor alpha of the regulariser, the sum of exp(-threshold) over all rows: the more, the sparser. The paper has
    5e-4 for a perceptron, 5e-6 for convolutions, 1e-4 for an LSTM."""

    def reads_optimizer_state(self) -> bool:
        """What is pruned is counted on masters, by element."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a threshold on every row of every target."""
        from leanmill.sparse.learned_threshold.rule import PushThresholds
        from leanmill.sparse.learned_threshold.stage import LearnedThreshold

        sites.put(sites.select(self.targets, self.exclude), lambda site: LearnedThreshold(site.raw_weight))
        return Installation(step_rules=(PushThresholds(sites.model, self.push),))
