"""The base of every configuration model. Importing it must never import torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, validated piece of a recipe; unknown keys are errors.

    Every field carries a docstring with its meaning, unit and source. Building one touches no
    device and imports no torch.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
