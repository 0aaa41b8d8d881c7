"""CFSP. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.surgery import Surgeon, SurgeryConfig


class Cfsp(SurgeryConfig):
    """Prune neurons, more of them in blocks that change their input less.

    Wang et al. 2024, arXiv:2409.13199. Coarse: how many neurons of a block stay follows the angle between what enters
    it and what leaves it. Fine: which, by their activations and by their share in weights. One forward of the rows.
    """

    type: Literal["cfsp"] = "cfsp"
    """Name of the pass."""
    sparsity: float = Field(gt=0, lt=1)
    """Share of the neurons of all MLPs that goes."""
    steepness: float = Field(default=26.0, ge=0)
    """How much budgets differ: that of a block is in proportion to the sigmoid of this times its angle, over pi, less
    the mean one. 0 gives every block the same; the authors' code comes to 26 (128 rows of 2048 tokens by 10^4)."""
    multiple_of: int = Field(default=8, ge=1)
    """Neurons of a block become a multiple of this."""

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.cfsp.surgeon import CfspSurgeon

        return CfspSurgeon(sparsity=self.sparsity, steepness=self.steepness, multiple_of=self.multiple_of)
