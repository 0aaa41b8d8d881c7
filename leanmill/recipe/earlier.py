"""Recipes of checkpoints that were saved before a key existed, where its default is not what runs did then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leanmill.recipe.root import Recipe


def as_meant(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's `recipe.json` with what came before `model.frozen_dtype`: all stayed in fp32."""
    model = saved.get("model")
    return {**saved, "model": {"frozen_dtype": "fp32", **model}} if isinstance(model, Mapping) else dict(saved)


def going_on(saved: Mapping[str, Any], recipe: Recipe) -> Recipe:
    """Return the recipe that resumes a checkpoint: frozen weights in fp32 stay so where it leaves that to `auto`.

    Args:
        saved: The checkpoint's `recipe.json`.
        recipe: Of the run.
    """
    model = as_meant(saved).get("model")
    was_whole = isinstance(model, Mapping) and model["frozen_dtype"] == "fp32"
    if recipe.model.frozen_dtype != "auto" or not was_whole:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"frozen_dtype": "fp32"})})
