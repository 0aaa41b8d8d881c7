"""Leanmill: train, fine-tune and compress small, sparse and low-bit language models."""

from __future__ import annotations

from typing import Any


__all__ = ["attach", "fold", "load_recipe", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: a recipe needs no torch, `attach` does. Type checkers read __init__.pyi. The
    # other verbs of `leanmill.api` are not named here: `leanmill.plan`, `leanmill.evaluate` and `leanmill.export` are
    # packages, and what a name means would change with the first import of one.
    homes = {"load_recipe": "api", "train": "api", "attach": "integrations", "fold": "integrations"}
    if name in homes:
        import importlib

        return getattr(importlib.import_module(f"leanmill.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
