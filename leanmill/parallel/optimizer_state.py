"""Bringing an optimizer's lazy state into being, whatever its keys are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


CHUNK = 32
"""Parameters whose state is made at once: bounds the extra memory, and the passes over all groups."""


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer, wanted: Sequence[Tensor] | None = None) -> None:
    """Give every parameter without state the state it would start from; weights stay bitwise.

    Optimizers make their state in the first step and each knows its own keys, so one step is taken
    with zero gradients, zero learning rate and zero decay. That leaves moments at zero and copies
    of weights equal to them; the counters (0-dim tensors) it has moved are set back to zero.

    Args:
        optimizer: Any.
        wanted: Its parameters that shall have state; None means all.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [p for p in (parameters if wanted is None else wanted) if not optimizer.state.get(p)]
    if not missing:
        return
    gradients = [p.grad for p in parameters]
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (group, {key: group[key] for key in ("lr", "weight_decay") if key in group}) for group in optimizer.param_groups
    ]
    try:
        for group, saved in settings:
            group.update((key, torch.zeros_like(v) if isinstance(v, Tensor) else 0.0) for key, v in saved.items())
        for parameter in parameters:
            parameter.grad = None
        for chunk in _chunks(missing):
            _step_in_place(optimizer, chunk)
    finally:
        for group, saved in settings:
            group.update(saved)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def pulled(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters whose state a rule writes before the first step too (`ParamSettings.pull` and `kept`)."""
    written = [group for group in optimizer.param_groups if group.get("pull") is not None or group.get("kept")]
    return [p for group in written for p in group["params"]]


def _step_in_place(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.grad = None
        parameter.copy_(value)
        for entry in optimizer.state[parameter].values():
            if isinstance(entry, Tensor) and entry.dim() == 0:
                entry.zero_()


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    for start in range(0, len(parameters), CHUNK):
        yield parameters[start : start + CHUNK]
