"""What configurations of quantised weights share. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import WeightTechniqueConfig


class SharedScales(WeightTechniqueConfig):
    """Base of techniques whose scales are shared by a weight, a row or a group of a row."""

    granularity: Literal["tensor", "row", "group"] = "row"
    """What shares a scale: a whole weight (each expert of a stacked one), an output row, or
    `group_size` neighbours of a row."""
    group_size: int | None = Field(default=None, ge=2)
    """Neighbours along the last dim that share a scale, for `granularity: group`."""

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> SharedScales:
        if (self.granularity == "group") != (self.group_size is not None):
            given = "without" if self.group_size is None else f"with granularity {self.granularity} and"
            name = type(self).model_fields["type"].default
            raise ConfigError(
                f"{name} {given} group_size {self.group_size}; set granularity: group and e.g. group_size: 128 "
                f"together, or neither"
            )
        return self
