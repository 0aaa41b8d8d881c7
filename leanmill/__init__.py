"""Leanmill: train, fine-tune and compress small, sparse and low-bit language models."""

from __future__ import annotations

from typing import Any


__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Named here, since they are what another trainer's code calls; torch is imported when they are asked for.
    if name in ("attach", "fold"):
        import importlib

        return getattr(importlib.import_module("leanmill.integrations"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
