"""From sizes as a recipe asks for them to sizes of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.sparse.structured.anatomy import Sizes


Target = Annotated[float, Field(gt=0, lt=1, strict=True)] | Annotated[int, Field(ge=1, strict=True)] | None
"""A size, or a share of what there is."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Sizes of a model to be, named as in a transformers configuration; what is not named stays."""

    technique: str
    asked: Mapping[str, int | float | None]
    multiple_of: int
    """What channels and neurons that are given as a share become a multiple of."""

    def sizes(self, old: Sizes) -> Sizes:
        """Return the sizes of the model to be.

        Raises:
            ConfigError: More than there is, nothing less than there is, or heads that do not divide.
        """
        heads, groups = self._heads(old)
        new = replace(
            old,
            hidden=self.size("hidden_size", old.hidden, self.multiple_of),
            neurons=self.size("intermediate_size", old.neurons, self.multiple_of),
            layers=self.size("num_hidden_layers", old.layers, 1),
            heads=heads,
            groups=groups,
        )
        if new == old:
            raise ConfigError(f"{self.technique}: the model has these sizes already; ask for less than there is")
        return new

    def _heads(self, old: Sizes) -> tuple[int, int]:
        shared = old.heads // old.groups
        groups = self.size("num_key_value_heads", old.groups, 1)
        # Where no two query heads share a key-value head, either number is the other.
        if self.asked.get("num_key_value_heads") is None and shared == 1:
            groups = self.size("num_attention_heads", old.heads, 1)
        if self.asked.get("num_attention_heads") is None:
            return groups * shared, groups
        heads = self.size("num_attention_heads", old.heads, groups)
        if heads % groups or heads > groups * shared:
            fitting = ", ".join(str(groups * number) for number in range(1, shared + 1))
            raise ConfigError(
                f"{self.technique}: num_attention_heads={heads} from {groups} key-value heads with {shared} query "
                f"heads each; type one of {fitting}, or another num_key_value_heads"
            )
        return heads, groups

    def size(self, name: str, there: int, multiple_of: int | None = None) -> int:
        """Return one size of the model to be, where `there` is what the model has.

        Raises:
            ConfigError: More than there is.
        """
        multiple_of = self.multiple_of if multiple_of is None else multiple_of
        asked = self.asked.get(name)
        if asked is None:
            return there
        if isinstance(asked, float):
            return min(there, max(1, round(asked * there / multiple_of)) * multiple_of)
        if asked > there:
            raise ConfigError(f"{self.technique}: {name}={asked}, and the model has {there}; type at most {there}")
        return asked
