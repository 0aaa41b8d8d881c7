"""What the configurations of losses over pairs share. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from leanmill.core.technique import TechniqueConfig


class PreferenceConfig(TechniqueConfig):
    """Mixed into techniques that compare answers with what a reference thinks of them."""

    beta: float = Field(default=0.1, gt=0)
    """How much a log-ratio to the reference counts: the larger, the closer the model stays to it."""
    reference: str | None = Field(default=None, min_length=1)
    """Folder or hub name of the frozen reference; None is the model itself with its adapters turned off, which needs
    adapters (`lora`) and nothing else that trains."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss."""

    def frozen_models(self) -> Mapping[str, str]:
        """Return the reference, where it is a model of its own."""
        return {} if self.reference is None else {"reference": self.reference}
