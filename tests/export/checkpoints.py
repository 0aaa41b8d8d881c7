"""Checkpoints of tiny models with techniques, written by the real manager, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.checkpoint.manager import CheckpointManager
from leanmill.core.technique import InstallContext
from leanmill.models.build import build_on_meta
from leanmill.models.materialise import make_materialiser
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import compact_weights, install_techniques
from tests.models.families import tiny_config


class HeldModel:
    """As much of an engine as a checkpoint asks for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def model_state(self) -> dict[str, Tensor]:
        return {**dict(state_parameters(self.model)), **dict(state_buffers(self.model))}

    def optimizer_state(self) -> dict[str, Tensor]:
        return {}


def recipe_of(
    family: str,
    techniques: list[dict[str, Any]],
    path: Path | None = None,
    frozen_dtype: str = "auto",
    precision: str = "auto",
    **changes: Any,
) -> Recipe:
    model: dict[str, Any] = {"path": str(path)} if path is not None else {"config": tiny_config(family, **changes)}
    return Recipe.model_validate(
        {
            "model": model | {"frozen_dtype": frozen_dtype},
            "techniques": techniques,
            "train": {"steps": 4, "precision": precision},
            "data": {"sequence_length": 32},
            "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 64},
            "checkpoint": {"asynchronous": False},
        }
    )


def trained_model(recipe: Recipe) -> Any:
    """Build, install, fill, and move every trainable weight a little, as training would."""
    model = build_on_meta(recipe.model, vocab_size=None, device_type="cpu")

    def no_teacher(path: str) -> nn.Module:
        raise AssertionError(path)

    context = InstallContext(load_frozen_model=no_teacher, vocab_size=97, seed=recipe.seed)
    techniques = install_techniques(recipe.techniques, model, context)
    compact_weights(recipe, model)
    make_materialiser(recipe.model, seed=recipe.seed, fill_branches=techniques.fill_branches)(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in state_parameters(model):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model: nn.Module, recipe: Recipe, run_dir: Path) -> Path:
    manager = CheckpointManager(run_dir, recipe.checkpoint)
    manager.save(3, HeldModel(model), {"step": 3}, recipe.model_dump(mode="json"))  # type: ignore[arg-type]
    latest = manager.latest()
    assert latest is not None
    return latest


def checkpoint_of(run_dir: Path, family: str, techniques: list[dict[str, Any]], **options: Any) -> tuple[Any, Path]:
    """Return the model as trained and the folder of its checkpoint."""
    recipe = recipe_of(family, techniques, **options)
    model = trained_model(recipe)
    return model, save(model, recipe, run_dir)
