"""Refusals of the N:M operations, each with what was given, what is allowed and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.nm_mask.naive import LARGEST_GROUP, packed_width
from leanmill.kernels.sharded import is_dtensor


_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pattern(num_kept: int, group_size: int) -> None:
    """Refuse an N:M that is none."""
    if not 2 <= group_size <= LARGEST_GROUP or not 1 <= num_kept < group_size:
        raise ValueError(
            f"{num_kept} of {group_size} is no N:M pattern; allowed: group_size (M) 2 to {LARGEST_GROUP} and "
            f"num_kept (N) 1 to M - 1; without pruning, leave the operation out"
        )


def check_weight(weight: Tensor, num_kept: int, group_size: int, transposable: bool = False) -> None:
    """Refuse weights that the pattern does not divide, and dtypes without magnitudes."""
    check_pattern(num_kept, group_size)
    shape = list(weight.shape)
    if weight.dtype not in _FLOATING:
        raise ValueError(
            f"a weight {shape} of {weight.dtype} is not covered; allowed: {', '.join(map(str, _FLOATING))}; "
            f"convert it with weight.float() first"
        )
    if transposable and (num_kept, group_size) != (2, 4):
        raise ValueError(f"transposable masks are 2 of 4, not {num_kept} of {group_size}; pass 2 and 4")
    num_dims = 1 + transposable
    if weight.dim() < num_dims or any(size % group_size for size in weight.shape[-num_dims:]):
        allowed, whose = ("..., out, in", "both of its last dims") if transposable else ("..., in", "its last dim")
        raise ValueError(
            f"a weight {shape} has no whole groups of {group_size}; allowed: [{allowed}] where {group_size} divides "
            f"{whose}; pad it or choose another group_size"
        )


def check_decay(decay: Tensor, weight: Tensor) -> None:
    """Refuse a decay that is not one number next to the weight."""
    if decay.numel() != 1 or not decay.is_floating_point() or decay.device != weight.device:
        raise ValueError(
            f"decay {list(decay.shape)} of {decay.dtype} on {decay.device} does not fit a weight on {weight.device}; "
            f"allowed: one floating element on the weight's device, e.g. weight.new_tensor([2e-4])"
        )


def check_compressed(values: Tensor, indices: Tensor, num_kept: int, group_size: int) -> None:
    """Refuse values and indices that do not belong together."""
    check_pattern(num_kept, group_size)
    given = f"values {list(values.shape)} of {values.dtype} with indices {list(indices.shape)} of {indices.dtype}"
    if values.dtype not in _FLOATING or indices.dtype != torch.uint8 or values.device != indices.device:
        raise ValueError(
            f"{given} on {values.device} and {indices.device} cannot be expanded; allowed: "
            f"{', '.join(map(str, _FLOATING))} with torch.uint8 on one device; pass what nm_compress returned"
        )
    if values.dim() < 1 or values.shape[-1] % num_kept:
        raise ValueError(f"{given} are no whole groups of {num_kept} values; pass what nm_compress returned")
    expected = [*values.shape[:-1], packed_width(values.shape[-1], group_size)]
    if list(indices.shape) != expected:
        raise ValueError(
            f"{given} do not belong together at {num_kept} of {group_size}: indices must be {expected}; "
            f"pass what nm_compress returned for the same pattern"
        )


def check_plain(tensor: Tensor, name: str) -> None:
    """Refuse sharded tensors where the result has another shape."""
    if is_dtensor(tensor):
        raise ValueError(
            f"{name} {list(tensor.shape)} is a DTensor; allowed: plain tensors; "
            f"pass {name}.to_local() of whole rows, or {name}.full_tensor()"
        )
