"""Configuration of layer sampling. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
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
    train_embeddings: bool = True
    """Train embedding and head beside the layers, as the paper does. In a small model they are most of what
    trains; false freezes both."""

    def changes_what_trains(self) -> bool:
        """Always."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Arrange for the layers to take turns.

        Raises:
            ConfigError: `num_layers` is more than the model has, or there is no seed to draw with.
        """
        from leanmill.peft_ext.lisa.schedule import layer_sampling

        return layer_sampling(
            sites,
            num_layers=self.num_layers,
            every_steps=self.every_steps,
            train_embeddings=self.train_embeddings,
            seed=context.seed,
        )
