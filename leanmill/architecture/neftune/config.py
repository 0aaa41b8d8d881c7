"""Configuration of NEFTune. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class NefTune(TechniqueConfig):
    """Add uniform noise to the embeddings of tokens in training (Jain et al. 2023, arXiv:2310.05914)."""

    type: Literal["neftune"] = "neftune"
    """Name of the technique."""
    alpha: float = Field(default=5.0, gt=0)
    """Size of the noise: each element is drawn from [-alpha, alpha) / sqrt(L d), for a document of L tokens and
    embeddings of d elements. The paper tries 5, 10 and 15."""

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return True: embeddings are whole, and noise is drawn by row of the data."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the table of embeddings."""
        from leanmill.architecture.neftune.around import install

        return Installation(step_rules=install(sites, context, alpha=self.alpha))
