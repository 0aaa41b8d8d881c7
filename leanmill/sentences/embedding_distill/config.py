"""Configuration of distillation from a teacher's vectors of texts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, ModelTask, TrainedTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class EmbeddingDistill(TrainedTechniqueConfig):
    """Match a frozen teacher's vectors of texts (Reimers and Gurevych 2020, arXiv:2004.09813)."""

    type: Literal["embedding_distill"] = "embedding_distill"
    """Name of the technique."""
    teacher: str = Field(min_length=1)
    """Folder or hub name of the teacher, an encoder with the student's tokenizer."""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    """How its hidden states become a vector; `auto` is as its folder says (sentence-transformers' layout), else the
    mean."""
    loss: Literal["cosine", "mse"] = "cosine"
    """Distance of two vectors: 1 - cosine, or the mean squared difference of their entries."""
    linear_map: Literal["where_needed", "always", "never"] = "where_needed"
    """Learn a linear map from the student's width to the teacher's: only where the widths differ, in any case, or not
    at all. It stays behind at export."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss, the mean over texts, beside others."""

    def model_tasks(self) -> frozenset[ModelTask]:
        """Return the one with vectors."""
        return frozenset({"embedding"})

    def learns_embeddings(self) -> bool:
        """It does."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the model; the teacher is loaded when training starts."""
        from leanmill.sentences.embedding_distill.match import match_teacher

        match_teacher(
            sites,
            context,
            teacher=self.teacher,
            pooling=self.pooling,
            kind=self.loss,
            linear_map=self.linear_map,
            weight=self.weight,
        )
        return Installation()

    def frozen_models(self) -> Mapping[str, str]:
        """Return the teacher."""
        return {"teacher": self.teacher}

    def is_for_training_only(self, name: str) -> bool:
        """Whether `name` is of the map: an export has no teacher to map to."""
        return name.startswith("around.embedding_distill")
