"""Reading a checkpoint into live tensors, whatever their layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from leanmill.checkpoint.compare import compare
from leanmill.checkpoint.group import SaveGroup, message_of, one_process_is_meant
from leanmill.checkpoint.manifest import Manifest
from leanmill.checkpoint.reading import read_index
from leanmill.checkpoint.storage import SafetensorsReader
from leanmill.core.errors import ConfigError, RunError


def read_part(
    folder: Path, state: Mapping[str, Tensor], group: SaveGroup, *, only: Callable[[str], bool] = lambda name: True
) -> None:
    """Read a part of a checkpoint into the tensors of `state`, in place; collective.

    Args:
        folder: Of the part.
        state: Names to tensors.
        group: Of all ranks.
        only: Which of the part's names are meant.

    Raises:
        ConfigError: It holds other tensors.
        RunError: A file is damaged.
    """
    stored = {name: entry for name, entry in read_index(folder).items() if only(name)}
    problem = compare(stored, state, folder)
    if problem:
        raise ConfigError(problem)
    error = ""
    try:
        one_process_is_meant()
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        # Every rank plans its own reads: nothing needs to be agreed, so nothing is sent.
        dcp.load(dict(state), storage_reader=SafetensorsReader(folder), planner=planner, no_dist=True)
    except (CheckpointException, RunError, OSError) as failure:
        error = message_of(failure)
    if group.total(bool(error)):
        raise RunError(error or f"{folder}: another rank failed to read it")


def check_kind(folder: Path, manifest: Manifest, names: Collection[str] | None, base: str | None) -> None:
    """Raise ConfigError where a checkpoint holds other parts of a model, or parts of another one, than a run saves."""
    if manifest.partial != (names is not None):
        held, asked = ("only the trained parameters", "all") if manifest.partial else ("all", "only the trained")
        raise ConfigError(
            f"{folder} holds {held}, this run saves {asked} parameters: their techniques differ; "
            f"use the recipe in {folder}/recipe.json, or another run_dir"
        )
    if manifest.base is not None and base is not None and manifest.base != base:
        raise ConfigError(
            f"{folder} was trained on another base model (fingerprint {manifest.base[:12]}, this run's is "
            f"{base[:12]}); set model.path or model.config and seed as in {folder}/recipe.json"
        )
