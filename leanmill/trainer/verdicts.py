"""Remembers which models were found buildable, since finding out imports torch and transformers. Imports neither.

The two take three seconds, and between two checks of a recipe its model seldom changes. Only a
positive verdict is kept: a refusal is always made by the code that would refuse the run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import leanmill
from leanmill.data.cache import fingerprint
from leanmill.kernels.native.user_cache import user_cache
from leanmill.recipe.root import Recipe


_ASKED: Any = {
    "model": True,
    "techniques": True,
    "device": True,
    "optimizer": {"type", "lookahead"},
    "data": {"sequence_length": True, "document_mask": True, "tokenizer": True},
    "train": {"activation_checkpointing"},
}
"""What of a recipe `leanmill.trainer.trial` looks at."""
_LIBRARIES = ("torch", "transformers", "peft", "torchao")


def is_known_good(recipe: Recipe) -> bool:
    """Whether a model like this one was built before, by the same code and libraries."""
    path = _path(recipe)
    return path is not None and path.is_file()


def remember(recipe: Recipe) -> None:
    """Keep that the recipe's model can be built; a cache that cannot be written is no reason to fail."""
    path = _path(recipe)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _path(recipe: Recipe) -> Path | None:
    if recipe.model.path is not None:
        return None  # a checkpoint's files may change under its name
    what = [recipe.model_dump(mode="json", include=_ASKED), _code(), platform.node()]
    return user_cache() / "checked" / fingerprint(what)


def _code() -> list[str]:
    """Identify the code: versions of the libraries, size and time of every file of the package."""
    known = [f"{name} {_version(name)}" for name in _LIBRARIES]
    for path in sorted(Path(leanmill.__file__).parent.rglob("*.py")):
        status = path.stat()
        known.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return known


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
