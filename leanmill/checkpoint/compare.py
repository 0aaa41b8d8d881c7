"""Say how a checkpoint and a run differ, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from leanmill.checkpoint.reading import StoredTensor


_OF_ROUNDED = (".qmap",)
"""What state that is kept in rounded blocks has beside its codes."""


def compare(stored: Mapping[str, StoredTensor], live: Mapping[str, Tensor], folder: Path) -> str:
    """Return what keeps `stored` from being read into `live`; empty when nothing does.

    Names and whole shapes must agree. Floating-point dtypes may differ (values are cast), a float
    never goes into an integer or bool tensor or back.
    """
    missing = sorted(live.keys() - stored.keys())
    unexpected = sorted(stored.keys() - live.keys())
    changed = [
        name
        for name in sorted(stored.keys() & live.keys())
        if tuple(stored[name].shape) != tuple(live[name].shape)
        or (stored[name].dtype != live[name].dtype and not _both_float(stored[name], live[name]))
    ]
    different = [f"{name} {_shown(stored[name])} in the checkpoint, {_shown(live[name])} here" for name in changed]
    parts = [
        _listed("not in the checkpoint", missing),
        _listed("only in the checkpoint", unexpected),
        _listed("different", different),
    ]
    found = "; ".join(part for part in parts if part)
    if not found:
        return ""
    kind = "optimizer" if folder.name == "optimizer" else "model"
    remedy = "use the recipe saved beside it (recipe.json), or another run_dir"
    if kind == "optimizer" and any(name.endswith(_OF_ROUNDED) for name in (*unexpected, *missing, *changed)):
        remedy = (
            "optimizer.type=adamw8bit rounds blocks of the parts that ranks hold, so its state goes on under the "
            "engine and on the number of ranks it was written with; resume there, or begin anew from its weights "
            "(leanmill export, then model.path)"
        )
    return f"{folder} belongs to another {kind}: {found}; {remedy}"


def _both_float(stored: StoredTensor, live: Tensor) -> bool:
    return stored.dtype.is_floating_point and live.dtype.is_floating_point


def _shown(tensor: Tensor | StoredTensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{len(names)} {what} ({', '.join(names[:2])}{more})"
