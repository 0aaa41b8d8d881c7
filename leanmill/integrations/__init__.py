"""Techniques under other trainers: `attach`, `fold`, and a callback for transformers' Trainer. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from leanmill.integrations.attached import Attached, attach, attached_to
    from leanmill.integrations.callback import LeanmillCallback
    from leanmill.integrations.folded import export, fold

_PLACES = {
    "Attached": "leanmill.integrations.attached",
    "attach": "leanmill.integrations.attached",
    "attached_to": "leanmill.integrations.attached",
    "export": "leanmill.integrations.folded",
    "fold": "leanmill.integrations.folded",
    "LeanmillCallback": "leanmill.integrations.callback",
}

__all__ = ["Attached", "LeanmillCallback", "attach", "attached_to", "export", "fold"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
