"""Experts as a folder stores them, one by one, and as modules hold them, stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from leanmill.core.stored_experts import StoredExperts


_MODULE = "mlp"
"""What every family of `STORED_EXPERTS` calls the sparse MLP in its modules."""


def module_names(names: Iterable[str], stored: StoredExperts | None) -> set[str]:
    """Return what the modules of a block call the tensors of these names, both relative to it."""
    if stored is None:
        return set(names)
    found = {_renamed(name, stored) for name in names if not stored.is_of_experts(name)}
    if any(stored.is_of_experts(name) for name in names):
        found |= {f"{_MODULE}.experts.gate_up_proj", f"{_MODULE}.experts.down_proj"}
    return found


def stacked(tensors: Mapping[str, Tensor], stored: StoredExperts | None) -> dict[str, Tensor]:
    """Return the tensors of a block as its modules hold them."""
    if stored is None:
        return dict(tensors)
    found = {_renamed(name, stored): value for name, value in tensors.items() if not stored.is_of_experts(name)}
    experts = range(stored.num_experts(tensors.keys()))
    if experts:
        gate, up, down = (
            [tensors[stored.expert(expert, part)] for expert in experts] for part in ("gate", "up", "down")
        )  # type: ignore[arg-type]
        found[f"{_MODULE}.experts.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
        found[f"{_MODULE}.experts.down_proj"] = torch.stack(down)
    return found


def _renamed(name: str, stored: StoredExperts) -> str:
    return f"{_MODULE}.{name.removeprefix(f'{stored.module}.')}" if name.startswith(f"{stored.module}.") else name
