"""Configuration of distillation from a teacher's hidden states. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class HiddenDistill(TrainedTechniqueConfig):
    """Match a frozen teacher's hidden states in chosen layers (Jiao et al. 2019, arXiv:1909.10351)."""

    type: Literal["hidden_distill"] = "hidden_distill"
    """Name of the technique."""
    teacher: str = Field(min_length=1)
    """Folder or hub name of the teacher, a causal LM with the student's tokenizer."""
    layers: Literal["uniform", "last"] | list[tuple[int, int]] = "uniform"
    """Which block of the student learns from which of the teacher: `uniform` spreads the student's blocks
    evenly over the teacher's, the last on the last; `last` takes only that pair; or pairs
    [student, teacher] of indices from 0, negative ones from the end."""
    loss: Literal["mse", "cosine", "normalised_mse"] = "mse"
    """Distance of a token's hidden states: mean squared error over their entries; 1 - cosine (Sanh et al.
    2019, arXiv:1910.01108); squared error over the teacher's squared length (Bercovich et al. 2024,
    arXiv:2411.19146)."""
    linear_map: Literal["where_needed", "always"] = "where_needed"
    """Learn a linear map from the student's width to the teacher's for each pair: only where the widths
    differ, or in any case."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss, the mean over pairs, beside cross-entropy (`train.cross_entropy_weight`)."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the chosen blocks; the teacher is loaded when training starts."""
        from leanmill.distill.hidden.match import match_layers

        match_layers(
            sites,
            context,
            teacher=self.teacher,
            layers=self.layers,
            kind=self.loss,
            always_maps=self.linear_map == "always",
            weight=self.weight,
        )
        return Installation()

    def frozen_models(self) -> Mapping[str, str]:
        """Return the teacher."""
        return {"teacher": self.teacher}

    def is_for_training_only(self, name: str) -> bool:
        """Whether `name` is of a map: an export has no teacher to map to."""
        return ".around.hidden_distill" in name
