"""Weights that ZeRO-3 gathers are no part of what a block recomputes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes


_AROUND_A_MODULE = (
    "pre_sub_module_forward_function",
    "post_sub_module_forward_function",
    "pre_sub_module_backward_function",
    "post_sub_module_backward_function",
)


def gather_unseen(optimizer: Any) -> None:
    """Hide what a ZeRO-3 optimizer does around modules from the modes that are on.

    A block that keeps a part of what it computed counts every operator that it sees, and wants as many in its
    recomputation; how many gather a weight depends on which weights are still there.

    Args:
        optimizer: DeepSpeed's, of stage 3.
    """
    hooks = optimizer.parameter_offload
    for name in _AROUND_A_MODULE:
        setattr(hooks, name, _unseen(getattr(hooks, name)))


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call
