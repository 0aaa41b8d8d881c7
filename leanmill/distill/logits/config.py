"""Configuration of distillation from a teacher's logits. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Distill(TechniqueConfig):
    """Match a frozen teacher's next-token distribution (Hinton et al. 2015, arXiv:1503.02531)."""

    type: Literal["distill"] = "distill"
    """Name of the technique."""
    teacher: str = Field(min_length=1)
    """Folder or hub name of the teacher, a causal LM with the student's vocabulary."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """`forward_kl`: KL(teacher || student). `reverse_kl`: KL(student || teacher). `js`: generalised
    Jensen-Shannon (Agarwal et al. 2023, arXiv:2306.13649)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `js`; not used by the others."""
    temperature: float = Field(default=1.0, gt=0)
    """T that divides both models' logits; the loss is multiplied by T^2, which keeps the size of
    its gradient."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss beside cross-entropy (`train.cross_entropy_weight`)."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the loss term; the teacher is loaded when training starts."""
        from leanmill.distill.logits.term import DistillTerm

        term = DistillTerm(
            context,
            teacher=self.teacher,
            kind=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            weight=self.weight,
        )
        return Installation(loss_terms=(term,))

    def frozen_models(self) -> Mapping[str, str]:
        """Return the teacher."""
        return {"teacher": self.teacher}

    def num_frozen_logits(self) -> int:
        """One, the teacher's."""
        return 1
