"""Configuration of BA-LoRA's regularisers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class BaLora(TechniqueConfig):
    """Keep an adapted model near the one it came from, its predictions diverse, its logits of few strong directions.

    The three regularisers of BA-LoRA (Chang et al. 2024, arXiv:2408.04556) for models that write, beside any adapter.
    """

    type: Literal["ba_lora"] = "ba_lora"
    """Name of the technique."""
    reference: str | None = Field(default=None, min_length=1)
    """Folder or hub name of the model before adaptation, normally that of `model.path`: a frozen model of its own, so
    that it says what the original says whatever a start has moved into the adapter (PiSSA, OLoRA). `consistency`
    needs it."""
    consistency: float = Field(default=1e-4, ge=0)
    """Weight of KL(reference || model) of every token (lambda 1); 0 leaves it out."""
    diversity: float = Field(default=3e-4, ge=0)
    """Weight of minus the entropy of the model's distribution for every token (lambda 2); 0 leaves it out."""
    singular_values: float = Field(default=1e-4, ge=0)
    """Weight of minus the share that the largest singular values of a matrix of logits have in the sum of all
    (lambda 3); 0 leaves it out."""
    num_largest: int = Field(default=3, ge=1)
    """How many of them (k)."""
    group_tokens: int = Field(default=32, ge=2)
    """Neighbouring positions of a row whose logits are one matrix, a divisor of `data.sequence_length`."""

    @model_validator(mode="after")
    def _has_what_it_compares(self) -> Self:
        if not (self.consistency or self.diversity or self.singular_values):
            raise ConfigError("ba_lora has three weights of 0, which is nothing; set one, or remove ba_lora")
        if self.consistency and self.reference is None:
            raise ConfigError(
                "ba_lora.consistency compares with the model before adaptation; set ba_lora.reference to the folder "
                "or hub name in model.path, or consistency: 0"
            )
        if not self.consistency and self.reference is not None:
            raise ConfigError("ba_lora.reference is read for consistency alone, which is 0; remove it")
        if self.num_largest >= self.group_tokens:
            raise ConfigError(
                f"ba_lora.num_largest={self.num_largest} are all singular values of group_tokens={self.group_tokens} "
                f"tokens; set num_largest below it"
            )
        return self

    def problems_with_rows_of(self, num_tokens: int) -> Iterable[str]:
        """Groups are whole."""
        if self.singular_values and num_tokens % self.group_tokens:
            divisor = max(n for n in range(1, self.group_tokens) if num_tokens % n == 0)
            yield (
                f"ba_lora.group_tokens={self.group_tokens} must divide data.sequence_length={num_tokens}; set "
                f"ba_lora.group_tokens={divisor}"
            )

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the loss terms; the reference is loaded when training starts."""
        from leanmill.core.frozen_head import FrozenHead
        from leanmill.core.losses import LossTerm
        from leanmill.peft_ext.ba_lora.terms import Consistency, Diversity, SingularValues

        terms: list[LossTerm] = []
        if self.reference is not None:
            head = FrozenHead(context, self.reference, technique=self.type, role="reference")
            terms.append(Consistency(head, self.consistency))
        if self.diversity:
            terms.append(Diversity(self.diversity))
        if self.singular_values:
            terms.append(SingularValues(self.singular_values, self.num_largest, self.group_tokens))
        return Installation(loss_terms=tuple(terms))

    def frozen_models(self) -> Mapping[str, str]:
        """Return the reference."""
        return {} if self.reference is None else {"reference": self.reference}

    def num_frozen_logits(self) -> int:
        """Those of the reference."""
        return int(self.reference is not None)
