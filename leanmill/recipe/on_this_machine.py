"""What a recipe names that is here to be looked at, and what is not. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from pathlib import Path

from leanmill.checkpoint.finding import is_run
from leanmill.core.paths import expand_user
from leanmill.data.config import HfDataset, Mixture
from leanmill.models.config import ModelConfig
from leanmill.recipe.root import Recipe


def local_model(model: ModelConfig) -> ModelConfig | None:
    """Return the section with its checkpoint as a local folder; None where it is not on this machine.

    A run counts as away, since only training writes its model, and so does a checkpoint that comes with its own code:
    checking runs no code of others.
    """
    if model.path is None:
        return model
    if model.trust_remote_code:
        return None
    folder = expand_user(model.path)
    if is_run(folder):
        return None
    if not folder.is_dir():
        found = _snapshot(model.path, model.revision)
        if found is None:
            return None
        folder = found
    return model.model_copy(update={"path": str(folder), "revision": None})


def not_looked_at(recipe: Recipe, to_come: Collection[str] = ()) -> Iterator[str]:
    """Yield a line for each thing that only training itself will read.

    Args:
        recipe: The recipe.
        to_come: Folders of models that earlier phases of the run will leave.
    """
    model = recipe.model
    if local_model(model) is None:
        why = "it brings code of its own" if model.trust_remote_code else _why_away(str(model.path))
        techniques = " and whether the techniques fit it" if recipe.techniques else ""
        yield f"model {model.path}{techniques}: {why}"
    for index, technique in enumerate(recipe.techniques):
        for key, path in {**technique.frozen_models(), **technique.read_models()}.items():
            if path not in to_come and local_model(ModelConfig(path=path)) is None:
                yield f"techniques.{index}.{key} {path}: {_why_away(path)}"
    tokenizer = recipe.data.tokenizer.path
    if tokenizer is not None:
        yield f"tokenizer {tokenizer}, its vocabulary and chat template"
    source = recipe.data.source
    for part in source.sources if isinstance(source, Mixture) else [source]:
        if isinstance(part, HfDataset):
            yield f"the rows of {part.path}"
    for package, extra in _packages(recipe):
        if importlib.util.find_spec(package) is None:
            yield f"the package {package}, which is not on this machine: pip install 'leanmill[{extra}]' where it runs"


def _packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the packages that training imports once it starts, and the extra that brings each."""
    if recipe.engine.type == "deepspeed":
        yield "deepspeed", "deepspeed"
    if recipe.log.wandb:
        yield "wandb", "wandb"
    if str(recipe.checkpoint.remote or "").startswith("s3://"):
        yield "s3fs", "s3"


def _why_away(path: str) -> str:
    is_a_run = is_run(expand_user(path))
    return "it is a run, whose model training writes first" if is_a_run else "it is not on this machine"


def _snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model that was downloaded with its weights; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None
