"""Configuration of layer sampling. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.passes import ObservingPassConfig
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from leanmill.core.sites import Sites


class Lisa(TechniqueConfig):
    """Train a few layers at a time, drawn anew every few steps (LISA: Pan et al. 2024, arXiv:2403.17919).

    The others rest: they have no gradient and no optimizer state. Embedding, final norm and head always train.
    """

    type: Literal["lisa"] = "lisa"
    """Name of the technique."""
    num_layers: int = Field(default=2, ge=1)
    """Layers that train at a time (gamma in the paper)."""
    every_steps: int = Field(default=20, ge=1)
    """Optimizer steps between draws (K in the paper)."""
    draw: Literal["uniform", "outliers"] = "uniform"
    """How layers are drawn. `outliers`: in proportion to what the pass `outliers` has found in each (OwLore, Li et al.
    2024, arXiv:2405.18380), for a model in `model.path` that it has looked at."""
    train_embeddings: bool = True
    """Train embedding and head beside the layers, as the paper does. In a small model they are most of what
    trains; false freezes both."""

    def changes_what_trains(self) -> bool:
        """Always."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Arrange for the layers to take turns.

        Raises:
            ConfigError: `num_layers` is more than the model has, there is no seed to draw with, or nothing is known of
                outliers.
        """
        from leanmill.peft_ext.lisa.schedule import layer_sampling

        weights = None
        if self.draw == "outliers" and context.block_scores is not None:
            weights = context.block_scores("outliers")

        return layer_sampling(
            sites,
            num_layers=self.num_layers,
            every_steps=self.every_steps,
            train_embeddings=self.train_embeddings,
            seed=context.seed,
            weights=weights,
        )


class Outliers(ObservingPassConfig):
    """Count the weights of each block that stand out (Yin et al. 2023, arXiv:2310.05175); the model stays as it is.

    `lisa` with `draw: outliers` then trains blocks with many of them more often.
    """

    type: Literal["outliers"] = "outliers"
    """Name of the pass."""
    threshold: float = Field(default=13.0, gt=0)
    """A weight stands out where its magnitude times the norm of its inputs is so many times the mean of its block (tau
    in the paper)."""

    def score(self, layers: Sequence[tuple[Tensor, Tensor]]) -> float:
        """See `outlier_share`."""
        from leanmill.peft_ext.lisa.outliers import outlier_share

        return outlier_share(layers, self.threshold)
