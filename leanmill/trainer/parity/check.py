"""Whether a person's own recipe trains on many ranks what it trains on one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanmill.core.errors import ConfigError
from leanmill.models.config import ModelConfig
from leanmill.models.mapping import mapped_config
from leanmill.models.pretrained import quiet_transformers
from leanmill.models.tasks import auto_class
from leanmill.parallel.config import AutoEngine, SingleEngine
from leanmill.recipe.root import Recipe
from leanmill.trainer.parity.compare import Bounds, Difference, compare
from leanmill.trainer.parity.ranks import traced_alone, traced_together
from leanmill.trainer.parity.shrink import NUM_MICRO_BATCHES, layout_of, num_ranks, shrunken, small_mapping
from leanmill.trainer.parity.trace import Trace


BOUNDS = {
    torch.float64: Bounds(loss=2e-5, gradient=1e-5, norm=2e-5, weight=1e-4),
    torch.float32: Bounds(loss=1e-4, gradient=1e-3, norm=1e-4, weight=1e-2),
}
"""Wider than those of the project's own matrix: any technique may round somewhere. A wrong factor is 50 % and more."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One engine beside one process."""

    title: str
    """Engine, layout, ranks and dtype, for people."""
    every: list[Difference]
    failed: list[Difference]


def check_parity(recipe: Recipe) -> Iterator[Checked]:
    """Train a small model with a recipe's techniques, engine and layout on 1 process and on 2 or 4.

    Yields a result an engine: of `engine: auto` both that it may choose, and of phases those of each that trains.

    Raises:
        ConfigError: There is nothing to compare, or such a recipe cannot be trained with a small model.
        RunError: A process failed.
    """
    if recipe.phases:
        for number, phase in enumerate(recipe.training_phases(), 1):
            for one in check_parity(phase):
                yield Checked(title=f"phase {number}, {one.title}", every=one.every, failed=one.failed)
        return
    if isinstance(recipe.engine, SingleEngine):
        raise ConfigError(
            "engine=single is one process, and there is nothing to compare; add engine=ddp or engine=fsdp"
        )
    asked = recipe.engine.model_dump(mode="json", exclude_defaults=True)
    kinds = ("ddp", "fsdp") if isinstance(recipe.engine, AutoEngine) else (recipe.engine.type,)
    for kind in kinds:
        yield _checked(recipe, {**asked, "type": kind})


def _checked(recipe: Recipe, engine: dict[str, Any]) -> Checked:
    world_size = num_ranks(recipe)
    if engine.get("shard_size"):
        engine["shard_size"] = 2
    packed = recipe.data.task != "masked"
    with tempfile.TemporaryDirectory(prefix="leanmill-teacher-") as teacher:
        _save_stand_in(recipe.model, Path(teacher))
        alone = shrunken(recipe, engine={"type": "single"}, world_size=1, teacher=teacher)
        together = shrunken(recipe, engine=engine, world_size=world_size, teacher=teacher)
        dtype, wanted = _alone(alone, engine["type"], packed=packed)
        found = traced_together(together, world_size, dtype, packed=packed)
    layout = layout_of(recipe.layout)
    sizes = {name: size for name, size in layout.items() if isinstance(size, int)}
    data_size = world_size // (layout.get("tp", 1) * layout.get("cp", 1))
    sizes = {"data ranks": data_size, **sizes, "micro-batches": NUM_MICRO_BATCHES}
    every, failed = compare(wanted, found, bounds=BOUNDS[dtype], sizes=sizes)
    spread = ", ".join(f"layout.{name}={value}" for name, value in layout.items() if not isinstance(value, dict))
    stage = f" stage {engine['stage']}" if "stage" in engine else ""
    title = f"{engine['type']}{stage}{f', {spread}' if spread else ''}, {world_size} ranks, {str(dtype)[6:]}"
    return Checked(title=title, every=every, failed=failed)


def _alone(recipe: Recipe, engine_type: str, *, packed: bool) -> tuple[torch.dtype, Trace]:
    """Train on one process, in fp64 where the engine and the family take it."""
    if engine_type != "deepspeed":  # whose masters are fp32
        try:
            return torch.float64, traced_alone(recipe, torch.float64, packed=packed)
        except RuntimeError as error:
            if "dtype" not in str(error):  # a family may compute a part of itself in fp32
                raise
    return torch.float32, traced_alone(recipe, torch.float32, packed=packed)


def _save_stand_in(model: ModelConfig, folder: Path) -> None:
    """Save a small model of random weights, for those beside the one that trains."""
    config = mapped_config(small_mapping(model), None, model.task)
    torch.manual_seed(1)
    with quiet_transformers():
        auto_class(model.task).from_config(config, dtype=torch.float32).save_pretrained(folder)
