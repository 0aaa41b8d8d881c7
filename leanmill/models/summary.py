"""What passes have noted of the model that they wrote, in its folder."""

from __future__ import annotations

import json
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.folders import SUMMARY
from leanmill.core.paths import expand_user
from leanmill.models.config import ModelConfig


def summary_of(model: ModelConfig) -> dict[str, Any]:
    """Return what the summary in a model's folder says; nothing where there is none, or it cannot be read."""
    if model.path is None:
        return {}
    try:
        found = json.loads((expand_user(model.path) / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def block_scores(model: ModelConfig, name: str) -> list[float]:
    """Return what the pass `name` has found of each decoder block of a model, from the first to the last.

    Raises:
        ConfigError: It has not looked at it.
    """
    found = (summary_of(model).get("block_scores") or {}).get(name)
    if not isinstance(found, list) or not all(isinstance(score, float | int) for score in found):
        raise ConfigError(
            f"model.path={model.path} does not say what the pass {name} has found in it; run the pass first, as a "
            f"phase {{passes: [{{type: {name}}}]}} or with leanmill compress, and set model.path to what it wrote"
        )
    return [float(score) for score in found]
