"""Outputs of C functions, in memory that costs few page faults."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from leanmill.kernels.native.dtypes import pointer


_LARGE_BYTES = 2**23
"""Smaller outputs usually are recycled memory, whose pages are there."""


def new_like(library: ctypes.CDLL, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return `torch.empty_like`, backed by huge pages where it is large.

    Args:
        library: Compiled from a source that includes `huge_pages.h`.
        like: A contiguous CPU tensor.
        dtype: Another dtype, or None for its own.
    """
    out = torch.empty_like(like, dtype=dtype)
    num_bytes = out.numel() * out.element_size()
    if num_bytes >= _LARGE_BYTES:
        library.prefer_huge_pages(pointer(out), ctypes.c_int64(num_bytes))
    return out
