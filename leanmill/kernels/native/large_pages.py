"""Large results on large pages: touching fresh memory in pages of 4 KiB costs more than writing it."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch import Tensor


_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def large_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised CPU tensor, on pages of 2 MiB where the system grants them.

    Args:
        like: Gives device, and dtype by default.
        shape: Of the result.
        dtype: Of the result.
    """
    out = like.new_empty(shape, dtype=dtype)
    first = -(-out.data_ptr() // _PAGE) * _PAGE
    last = (out.data_ptr() + out.numel() * out.element_size()) // _PAGE * _PAGE
    advise = _advise()
    if first < last and advise is not None:
        # A hint: the result does not depend on it, so neither does anything on its success.
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
    return out


@functools.cache
def _advise() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
