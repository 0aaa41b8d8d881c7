"""What the configurations of losses over pairs share. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import TechniqueConfig


class PreferenceConfig(TechniqueConfig):
    """Mixed into techniques that compare answers with what a reference thinks of them."""

    beta: float = Field(default=0.1, gt=0)
    """How much a log-ratio to the reference counts: the larger, the closer the model stays to it."""
    reference: str | None = Field(default=None, min_length=1)
    """Folder or hub name of the frozen reference; None is the model itself with its adapters turned off, which needs
    adapters (`lora`) and nothing else that trains."""
    cache_dir: str | None = Field(default=None, min_length=1)
    """Folder where the log-probabilities of every row under `reference` are kept: read where they are there, computed
    and written where not. A step whose rows are all there does not run the reference, and a run does not load it."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss."""

    @model_validator(mode="after")
    def _keeps_what_it_can_name(self) -> Self:
        if self.cache_dir is not None and self.reference is None:
            kind: str = self.type  # type: ignore[attr-defined]
            raise ConfigError(
                f"{kind}.cache_dir keeps what a named reference says, and without {kind}.reference it is the model "
                f"without its adapters; set {kind}.reference to the folder that training starts from, or remove "
                f"cache_dir"
            )
        return self

    def frozen_models(self) -> Mapping[str, str]:
        """Return the reference, where it is a model of its own."""
        return {} if self.reference is None else {"reference": self.reference}

    def knows_rows_by_number(self) -> bool:
        """A cache does."""
        return self.cache_dir is not None
