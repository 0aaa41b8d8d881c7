"""Calling attention for some rows of a batch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanmill.parallel.collectives import is_alone


_CACHES = ("past_key_values", "past_key_value", "layer_past")


def rows_to_run(attends: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the rows [N] of a batch that attention must be called for; None where that is for all.

    Only one process may choose: ranks must call the same modules. Where keys and values are kept all are computed,
    since later tokens of a row may attend to them. Reads values, so it waits for the device.

    Args:
        attends: bool [B, S].
        args: What attention is called with.
        kwargs: The same, by name.
    """
    if torch.compiler.is_compiling() or not is_alone() or any(kwargs.get(name) is not None for name in _CACHES):
        return None
    num_rows, length = attends.shape
    # A mask that is no tensor knows its rows by itself; and rows must be told from positions.
    given = [*args, *kwargs.values()]
    if num_rows == length or not all(one is None or _is_plain(one) for one in given):
        return None
    rows = attends.any(-1).nonzero().squeeze(-1)
    return None if len(rows) == num_rows else rows


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(one) for one in value)
    return isinstance(value, (Tensor, bool, int, float, str)) or value is None


def only(value: Any, rows: Tensor, num_rows: int) -> Any:
    """Return the `rows` of whatever has `num_rows` of them; everything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(only(one, rows, num_rows) for one in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == num_rows:
        return value[rows]
    return value
