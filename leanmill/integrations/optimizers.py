"""Torch's optimizer out of what accelerate and DeepSpeed put around it, and the groups that parameters are in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def is_deepspeed(optimizer: Any) -> bool:
    """Whether accelerate has given the optimizer to DeepSpeed."""
    return type(optimizer).__module__.startswith("accelerate.utils.deepspeed")


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's own optimizer."""
    return next(one for one in _chain(optimizer) if isinstance(one, torch.optim.Optimizer) and not _is_wrapper(one))


def parameter_groups(optimizer: Any) -> dict[int, dict[str, Any]]:
    """Return the group of each parameter by its id, also of those whose place in it a flat partition has taken."""
    groups = inner_optimizer(optimizer).param_groups
    owned = [group["params"] for group in groups]
    for one in _chain(optimizer):
        owned = getattr(one, "bit16_groups", owned)  # DeepSpeed's of stages 1 and 2, group by group
    return {id(p): group for group, parameters in zip(groups, owned, strict=True) for p in parameters}


def _chain(optimizer: Any) -> Iterator[Any]:
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _is_wrapper(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("accelerate")
