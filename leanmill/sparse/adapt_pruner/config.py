"""Adapt-Pruner. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.surgery import Surgeon, SurgeryConfig


class AdaptPruner(SurgeryConfig):
    """Prune a few heads and neurons, more of them in layers that change their input less.

    Pan et al. 2025, arXiv:2502.03460: one step of it. Steps and stretches of training take turns as phases of a recipe.
    Which heads and neurons go is told by a first-order Taylor expansion of the loss, for which the whole model is held
    in fp32, twice.
    """

    type: Literal["adapt_pruner"] = "adapt_pruner"
    """Name of the pass."""
    sparsity: float = Field(default=0.05, gt=0, lt=1)
    """Share of the heads and of the neurons there are now that goes, on average over layers."""
    amplitude: float = Field(default=0.02, ge=0)
    """By how much the share of a layer may differ: this times its importance, which lies between -1 and 1."""
    parts: Literal["both", "heads", "neurons"] = "both"
    """What goes. Heads go as key-value heads with all their query heads."""
    multiple_of: int = Field(default=8, ge=1)
    """Neurons of a layer become a multiple of this."""

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.adapt_pruner.surgeon import AdaptPrunerSurgeon

        return AdaptPrunerSurgeon(
            sparsity=self.sparsity,
            amplitude=self.amplitude,
            cuts_heads=self.parts != "neurons",
            cuts_neurons=self.parts != "heads",
            multiple_of=self.multiple_of,
        )
