"""The dropout of a model that exists is its config's; a recipe may want another."""

from __future__ import annotations

import re
from typing import Any

from leanmill.core.errors import ConfigError


SHARE = re.compile(r"(dropout|dropout_(rate|p|prob)|_pdrop)$")
"""Keys of configs that are shares of dropout."""


def set_dropout(hf_config: Any, share: float) -> None:
    """Write `share` into every dropout that a transformers config has, in place.

    Raises:
        ConfigError: It has none, and `share` is not 0.
    """
    values = hf_config.to_dict()
    keys = [key for key, value in values.items() if SHARE.search(key) and isinstance(value, int | float | None)]
    if share and not keys:
        raise ConfigError(
            f"model.dropout={share:g}: the family {hf_config.model_type} has no dropout; remove model.dropout"
        )
    for key in keys:
        setattr(hf_config, key, share)
