"""The files and folders that a recipe names, looked for on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from leanmill.checkpoint.remote import is_url
from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.data.config import HfDataset, Mixture, Prepared, sources_of
from leanmill.recipe.root import Recipe


_ALWAYS_LOCAL = ("checkpoint.resume", "data.tokenizer.chat_template")


def check_files(recipe: Recipe) -> None:
    """Refuse local paths of the recipe that do not exist or cannot be written; hub names are left to the hub.

    Not part of parsing: a recipe saved in a checkpoint stays readable after its data moved.

    Raises:
        ConfigError: One line for each path.
    """
    recipes = [recipe, *recipe.training_phases()]
    named = dict.fromkeys(pair for one in recipes for pair in _local_paths(one))
    of_phases = Path(recipe.run_dir.format(name=recipe.name), "phases")
    found = [
        f"{key}={path!r} does not exist; correct the path"
        for key, path in named
        # What a phase leaves is there when a later one begins.
        if _gone(path) and not (recipe.phases and expand_user(path).is_relative_to(of_phases))
    ]
    found += [
        f"{key}={str(folder)!r} cannot be written: {problem}; set {key} to a folder that can, e.g. {key}={example}"
        for key, folder, example in _written_folders(recipe)
        if (problem := _unwritable(folder))
    ]
    if found:
        raise ConfigError("\n".join(found))


def _written_folders(recipe: Recipe) -> Iterator[tuple[str, Path, str]]:
    """Yield (key, folder, an example of another) of what the run creates."""
    yield "run_dir", recipe.run_folder, "runs/{name}"
    if recipe.data.cache_dir is not None:
        yield "data.cache_dir", expand_user(recipe.data.cache_dir), "cache"


def _unwritable(folder: Path) -> str | None:
    """Say why `folder` cannot be created or written in, or None."""
    for place in (folder, *folder.absolute().parents):
        try:
            is_folder = place.is_dir()
            if not is_folder and not place.exists():
                continue
        except OSError as error:
            return f"{place}: {error.strerror}"
        if not is_folder:
            return f"{place} is a file"
        return None if os.access(place, os.W_OK | os.X_OK) else f"{place} is read-only for this user"
    return None


def _local_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, path) of every value that can only mean a local path."""
    named = {
        "model.path": recipe.model.path,
        "data.tokenizer.path": recipe.data.tokenizer.path,
        "data.tokenizer.chat_template": _template_file(recipe.data.tokenizer.chat_template),
        "checkpoint.resume": _resumed_path(recipe.checkpoint.resume),
    }
    for index, technique in enumerate(recipe.techniques):
        for key, model in {**technique.frozen_models(), **technique.read_models()}.items():
            named[f"techniques.{index}.{key}"] = model
    for index, phase in enumerate(recipe.phases):
        for name, model in ({} if phase.score is None else phase.score.models).items():
            named[f"phases.{index}.score.{name}_model"] = model
    is_mixture = isinstance(recipe.data.source, Mixture)
    for index, part in enumerate(sources_of(recipe.data)):
        key = f"data.source.sources.{index}" if is_mixture else "data.source"
        if isinstance(part, Prepared):
            named |= {f"{key}.path": part.path, f"{key}.scores": part.scores}
        elif isinstance(part, HfDataset):
            named |= {f"{key}.path": part.path, f"{key}.validation_path": part.validation_path}
    for key, path in named.items():
        if path is not None and (key in _ALWAYS_LOCAL or _looks_local(path)):
            yield key, path


def _resumed_path(resume: str) -> str | None:
    return None if resume in ("auto", "never") or is_url(resume) else resume


def _template_file(template: str | None) -> str | None:
    return None if template is None or "{" in template else template


def _looks_local(path: str) -> bool:
    data_file = Path(path).suffix in (".jsonl", ".json", ".parquet", ".arrow", ".txt")
    return path.startswith(("/", "./", "../", "~")) or data_file


def _gone(path: str) -> bool:
    expanded = expand_user(path)
    if any(sign in path for sign in "*?[") and not expanded.exists():
        root = Path(expanded.anchor) if expanded.is_absolute() else Path()
        return not any(root.glob(str(expanded.relative_to(root) if expanded.is_absolute() else expanded)))
    return not expanded.exists()
