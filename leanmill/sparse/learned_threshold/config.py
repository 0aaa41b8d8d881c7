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
    every layer finds its own sparsity, and weights come back. No share is asked for, unless by `sparsity`.
    """

    type: Literal["learned_threshold"] = "learned_threshold"
    """Name of the technique."""
    push: float = Field(default=1e-5, gt=0)
    """Factor alpha of the regulariser, the sum of exp(-threshold) over all rows: the more, the sparser. The paper has
    5e-4 for a perceptron, 5e-6 for convolutions, 1e-4 for an LSTM."""

    share: Literal["row", "matrix"] = "row"
    """What has a threshold of its own: an output row as in the paper, or a matrix (each expert of a stacked one), as in
    Layer Adaptive Progressive Pruning (Zhai et al. 2023, arXiv:2309.14157)."""
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of all targeted weights together that is to be pruned: `push` falls as it comes near and turns around
    beyond it, so the loss decides of layers alone. None pushes on and on."""

    def reads_optimizer_state(self) -> bool:
        """What is pruned is counted on masters, by element."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put thresholds on every target."""
        from leanmill.sparse.learned_threshold.rule import PushThresholds
        from leanmill.sparse.learned_threshold.stage import LearnedThreshold

        selected = sites.select(self.targets, self.exclude)
        sites.put(selected, lambda site: LearnedThreshold(site.raw_weight, self.share))
        return Installation(step_rules=(PushThresholds(sites.model, self.push, self.sparsity),))
