"""A run without storage, data or processes: what would fail at its start fails here, in the same words."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.technique import InstallContext
from leanmill.models.build import build_on_meta
from leanmill.optim.build import build_optimizer
from leanmill.recipe.on_this_machine import local_model
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import assemble, trainable


def try_model(recipe: Recipe) -> nn.Module | None:
    """Build a recipe's model on the meta device with techniques, losses, recomputation and optimizer.

    A model that is not on this machine is left out (see `leanmill.recipe.on_this_machine`).

    Returns:
        The model with its sites, on meta; None where it was left out.

    Raises:
        ConfigError: What starting the run would raise.
    """
    model_config = local_model(recipe.model)
    if model_config is None:
        return None
    uses_cuda = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    model = build_on_meta(
        model_config,
        vocab_size=recipe.data.trained_vocab_size,
        sequence_length=recipe.data.text_length,
        device_type="cuda" if uses_cuda else "cpu",
        packed=recipe.data.document_mask,
        compiled=recipe.train.compile,
    )
    context = InstallContext(load_frozen_model=_no_loading, vocab_size=model.config.vocab_size, seed=recipe.seed)
    _, module = assemble(recipe, model, context)
    build_optimizer(recipe.optimizer, trainable(module))
    return model  # type: ignore[no-any-return]


def _no_loading(path: str) -> NoReturn:
    raise ConfigError(f"checking loads no weights, but a technique asked for {path} at installation")
