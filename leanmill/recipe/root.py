"""The root of a recipe. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from leanmill.core.errors import ConfigError
from leanmill.recipe.rules import problems
from leanmill.recipe.sections import Sections


class Recipe(Sections):
    """One run: a model, data, an engine and any number of techniques."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _default_optimizer(cls, value: Any) -> Any:
        # `optimizer.lr=1e-3` on a recipe that leaves the optimizer to its default means that default.
        return {"type": "adamw", **value} if isinstance(value, dict) else value

    @field_validator("engine", mode="before")
    @classmethod
    def _expand_engine(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        found = list(problems(self))
        if found:
            raise ConfigError("\n".join(found))
        return self
