"""What the frozen models of a run are and cost, without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.flops import flops_per_token
from leanmill.recipe.root import Recipe


def frozen_paths(recipe: Recipe) -> list[str]:
    """Return the models that techniques keep beside the trained one, each once."""
    return list(dict.fromkeys(path for one in recipe.techniques for path in one.frozen_models().values()))


def frozen_on_meta(recipe: Recipe, path: str, to_come: Mapping[str, ModelConfig] | None = None) -> Any:
    """Build a frozen model without memory.

    Args:
        recipe: The recipe.
        path: Folder or hub name.
        to_come: Models that are known before they are there, by the folders where they will be.

    Raises:
        ConfigError: It is not there.
    """
    key = next(key for one in recipe.techniques for key, named in one.frozen_models().items() if named == path)
    if to_come and str(expand_user(path)) in to_come:
        return build_on_meta(
            to_come[str(expand_user(path))],
            vocab_size=recipe.data.trained_vocab_size,
            sequence_length=recipe.data.text_length,
            device_type="cpu",
        )
    if not expand_user(path).is_dir() and path.startswith(("/", ".", "~")):
        raise ConfigError(f"{key} {path!r} does not exist; correct the path")
    return build_on_meta(
        ModelConfig(path=path, trust_remote_code=recipe.model.trust_remote_code, task=recipe.model.task)
    )


def frozen_flops_per_token(recipe: Recipe, to_come: Mapping[str, ModelConfig] | None = None) -> float:
    """Return the FLOPs of one token's forward through every frozen model: a third of what training them would take."""
    length = recipe.data.text_length
    return sum(flops_per_token(frozen_on_meta(recipe, path, to_come), length) / 3 for path in frozen_paths(recipe))
