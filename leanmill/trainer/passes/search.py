"""A search over levels: levels are made and kept, a solver chooses, one model folder is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.core.errors import ConfigError
from leanmill.core.levels import Dense, Drop, SearchConfig, Space, State, described
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import load_weights
from leanmill.parallel.collectives import barrier
from leanmill.parallel.launch import Ranks
from leanmill.recipe.compress import CompressRecipe
from leanmill.trainer.passes.folder import TargetFolder
from leanmill.trainer.passes.judge import ModelJudge, key_of
from leanmill.trainer.passes.levels import LevelStore, Unit, units_of
from leanmill.trainer.passes.stream import BlockStream
from leanmill.trainer.passes.surgery import ModelReport


log = logging.getLogger(__name__)

LEVELS = "levels.json"
"""The map of levels, in the folder that is written."""
_VERSION = 1
"""Raise when the same settings would make other levels."""


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """The level of one unit."""

    name: str
    technique: str
    level: str
    error: float

    def __str__(self) -> str:
        return f"{self.technique} {self.name}: {self.level}, output error {self.error:.2%}"


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search chose."""

    reports: Sequence[UnitReport | ModelReport]
    layers: frozenset[str]
    """Those that have other weights than before."""


def space_of(config: SearchConfig, units: Sequence[Unit]) -> Space:
    """Return what a search chooses from, in bits."""
    costs = tuple(tuple(round(unit.numel * bits) for bits in config.sorted_bits) for unit in units)
    # Rounded as the costs are, so that a level of just the budget meets it.
    return Space(costs, sum(round(unit.numel * config.budget_bits) for unit in units))


def search_levels(
    config: SearchConfig,
    recipe: CompressRecipe,
    model: ModelConfig,
    stream: BlockStream,
    batches: Sequence[Mapping[str, Tensor]],
    writer: TargetFolder | None,
    *,
    ranks: Ranks,
    work_dir: Path,
) -> Searched:
    """Choose a level for each unit of a model, and write it.

    Args:
        config: The pass.
        recipe: With calibration and seed.
        model: Names the model's folder.
        stream: Its blocks.
        batches: This rank's calibration rows.
        writer: Where the result goes; None on ranks that write nothing.
        ranks: Which process this is.
        work_dir: Where levels and the state of the search are kept.

    Raises:
        ConfigError: A level does not fit, or there is too little calibration text.
        RunError: A layer cannot be solved, or the disk refuses.
    """
    _check_text(config, recipe)
    units = units_of(config, stream.shapes, stream.prefixes)
    judge = _judge(config, recipe, model, stream, batches, units, ranks=ranks, work_dir=work_dir)
    space = space_of(config, units)
    state = config.search(recipe.seed).run(space, judge)
    assert space.cost(state) <= space.budget
    num_tokens = recipe.calibration.num_rows * recipe.data.sequence_length
    loss = judge.losses([state], num_tokens=num_tokens, draw=f"{recipe.seed} end")[0]
    if writer is not None:
        _write(stream, units, state, judge.store, writer)
        (writer.path / LEVELS).write_text(_map(config, units, state, space, loss), encoding="utf-8")
    barrier()
    average = space.cost(state) / sum(unit.numel for unit in units)
    text = f"{average:.3f} bits a weight on average, KL from dense {loss:.5f} nats a token; levels stay in {work_dir}"
    return _searched(str(config.type), units, state, judge, text)  # type: ignore[attr-defined]


def _judge(
    config: SearchConfig,
    recipe: CompressRecipe,
    model: ModelConfig,
    stream: BlockStream,
    batches: Sequence[Mapping[str, Tensor]],
    units: Sequence[Unit],
    *,
    ranks: Ranks,
    work_dir: Path,
) -> ModelJudge:
    """Make the levels that are not there yet, and load the model that is judged with them."""
    settings = _settings(config, recipe, stream)
    store = LevelStore(work_dir / f"levels-{key_of(settings)}", config.sorted_levels)
    store.build(stream, [layer for unit in units for layer in unit.layers], writes=ranks.rank == 0)
    whole = load_weights(model, dtype=stream.dtype).to(stream.device).eval().requires_grad_(False)
    block_of = {name: index for index in range(len(stream)) for name in stream.linears(index)}
    how = config.model_dump(mode="json", exclude={"work_dir", *config.says_how_long})
    memory = work_dir / f"search-{key_of(settings | how)}.json"
    return ModelJudge(whole, stream.source, units, store, block_of, batches, ranks=ranks, memory=memory)


def _searched(technique: str, units: Sequence[Unit], state: State, judge: ModelJudge, text: str) -> Searched:
    levels, errors = judge.store.levels, judge.layer_errors()
    reports = [
        UnitReport(name=unit.name, technique=technique, level=described(levels[level]), error=errors[index][level])
        for index, (unit, level) in enumerate(zip(units, state, strict=True))
    ]
    changed = frozenset(
        layer
        for unit, level in zip(units, state, strict=True)
        if not isinstance(levels[level], Dense)
        for layer in unit.layers
    )
    return Searched(reports=[*reports, ModelReport(technique=technique, text=text)], layers=changed)


def _check_text(config: SearchConfig, recipe: CompressRecipe) -> None:
    given = recipe.calibration.num_rows * recipe.data.sequence_length
    if config.most_tokens > given:
        technique = str(config.type)  # type: ignore[attr-defined]
        rows = -(-config.most_tokens // recipe.data.sequence_length)
        raise ConfigError(
            f"{technique} judges on {config.most_tokens} tokens, and calibration has {given}; set "
            f"calibration.num_rows={rows}, or give the stages fewer tokens"
        )


def _settings(config: SearchConfig, recipe: CompressRecipe, stream: BlockStream) -> dict[str, Any]:
    """What the levels depend on."""
    return {
        "version": _VERSION,
        "model": fingerprint_folder(stream.source.path),
        "levels": [level.model_dump(mode="json") for level in config.sorted_levels],
        "targets": config.targets,
        "exclude": config.exclude,
        "data": recipe.data.model_dump(mode="json", exclude={"cache_dir"}),
        "calibration": recipe.calibration.num_rows,
        "seed": recipe.seed,
        "dtype": str(stream.dtype),
    }


def _write(stream: BlockStream, units: Sequence[Unit], state: State, store: LevelStore, writer: TargetFolder) -> None:
    """Write the model, what has the level `dense` bit for bit."""
    source = stream.source
    level_of = {layer: level for unit, level in zip(units, state, strict=True) for layer in unit.layers}
    for index, prefix in enumerate(stream.prefixes):
        tensors = source.read(name for name in source.keys if name.startswith(prefix))
        for layer in stream.linears(index):
            level = store.levels[level_of[layer]] if layer in level_of else Dense()
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if isinstance(level, Drop) and name in tensors:
                    tensors[name] = torch.zeros_like(tensors[name])
            if not isinstance(level, Dense | Drop):
                tensors[f"{layer}.weight"] = store.read(level_of[layer], index, layer)
        writer.write(tensors)
    for name in stream.other_names:
        writer.write(source.read([name]))
    writer.close(source)


def _map(config: SearchConfig, units: Sequence[Unit], state: State, space: Space, loss: float) -> str:
    document = {
        "levels": [level.model_dump(mode="json") for level in config.sorted_levels],
        "units": {unit.name: level for unit, level in zip(units, state, strict=True)},
        "bits": space.cost(state),
        "budget_bits": space.budget,
        "divergence": loss,
    }
    return json.dumps(document, indent=2) + "\n"
