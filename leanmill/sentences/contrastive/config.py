"""Configuration of contrastive learning with in-batch negatives. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, ModelTask, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Contrastive(TechniqueConfig):
    """Tell the text that belongs to another from all others of a batch (van den Oord et al. 2018, arXiv:1807.03748)."""

    type: Literal["contrastive"] = "contrastive"
    """Name of the technique."""
    temperature: float = Field(default=0.05, gt=0)
    """Cosines are divided by it."""
    negatives_from: Literal["step", "micro_batch"] = "step"
    """Whose second texts and hard negatives a first text is told from: those of all ranks and micro-batches of the
    optimizer step, so that neither ranks nor accumulation change the loss, for one more forward of a step with several
    micro-batches (Gao et al. 2021, arXiv:2101.06983); or those of one micro-batch, over all ranks."""
    symmetric: bool = False
    """Also tell the first text from all other first texts, given the second; the loss is the mean of both."""
    positive_score: float | None = None
    """Pairs with a score of at least this belong together; None leaves pairs with a score out."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss."""

    def model_tasks(self) -> frozenset[ModelTask]:
        """Return the one with vectors."""
        return frozenset({"embedding"})

    def learns_embeddings(self) -> bool:
        """It does."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the loss, and what collects the vectors of a step before its first backward."""
        from leanmill.sentences.contrastive.loss import ContrastiveLoss

        loss = ContrastiveLoss(
            context.ledger,
            temperature=self.temperature,
            whole_step=self.negatives_from == "step",
            symmetric=self.symmetric,
            positive_score=self.positive_score,
            weight=self.weight,
        )
        return Installation(loss_terms=(loss,))
