"""Configuration of distillation from a teacher's self-attention relations. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class RelationDistill(TechniqueConfig):
    """Match how a frozen teacher's queries, keys and values relate (Wang et al. 2020, arXiv:2012.15828)."""

    type: Literal["relation_distill"] = "relation_distill"
    """Name of the technique."""
    teacher: str = Field(min_length=1)
    """Folder or hub name of the teacher, a causal LM with the student's tokenizer."""
    layers: Literal["last", "uniform"] | list[tuple[int, int]] = "last"
    """Which block of the student learns from which of the teacher: `last` from last, as in the paper for small
    teachers (of 24 blocks and more it takes one before the last); `uniform`; or pairs, see `hidden_distill`."""
    relations: list[Literal["queries", "keys", "values"]] = Field(default=["queries", "keys", "values"], min_length=1)
    """Which projections are related to themselves; their losses add up."""
    num_relation_heads: int | None = Field(default=None, ge=1)
    """Heads that each projection is cut into for this; must divide its width in both models. None takes the most
    that do, up to the teacher's attention heads."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss, the mean over pairs, beside cross-entropy (`train.cross_entropy_weight`)."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the projections of the chosen blocks; the teacher is loaded when training starts."""
        from leanmill.distill.relations.match import match_relations

        rule = match_relations(
            sites,
            context,
            teacher=self.teacher,
            layers=self.layers,
            relations=tuple(dict.fromkeys(self.relations)),
            num_heads=self.num_relation_heads,
            weight=self.weight,
        )
        return Installation(step_rules=() if rule is None else (rule,))

    def frozen_models(self) -> Mapping[str, str]:
        """Return the teacher."""
        return {"teacher": self.teacher}
