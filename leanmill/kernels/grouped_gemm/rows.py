"""What surrounds a product of rows that torch computes: sums to tokens, factors and inner products of rows.

One pass each in C for the types it covers, tensor code for others. Sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, is_plain_cpu, pointer


_MIN_COLUMNS = 64
"""Fewer columns of a row are not worth a thread."""


def add_to_tokens(sums: Tensor, rows: Tensor, tokens: Tensor, scale: Tensor | None) -> None:
    """Add `scale[r] * rows[r]` to `sums[tokens[r]]`, rows in order, so that sums repeat.

    Args:
        sums: [T, width] in the wide dtype.
        rows: [R, width], contiguous.
        tokens: [R] int64.
        scale: [R] in the wide dtype, or None.
    """
    function = _function("add_to_tokens", rows, sums)
    if function is None:
        sums.index_add_(0, tokens, (rows if scale is None else _times(rows, scale)).to(sums.dtype))
        return
    num_rows, width = rows.shape
    arguments = (pointer(rows), pointer(tokens), _or_null(scale), pointer(sums), *_longs(num_rows, width))
    # Threads share columns: one token may have several of the rows.
    parts = max(1, min(torch.get_num_threads(), width // _MIN_COLUMNS))

    def work(first: int, last: int) -> None:
        function(*arguments, *_longs(width * first // parts, width * last // parts))

    threads.parallel_for(work, parts, rows.numel() // parts)


def scaled(rows: Tensor, scale: Tensor, *, in_place: bool = False) -> Tensor:
    """Return `scale[r] * rows[r]`, rounded once to the dtype of `rows` [R, width], contiguous."""
    function = _function("scale_rows", rows)
    if function is None:
        product = _times(rows, scale).to(rows.dtype)
        return rows.copy_(product) if in_place else product
    out = rows if in_place else torch.empty_like(rows)
    arguments = (pointer(rows), pointer(scale), pointer(out))

    def work(first: int, last: int) -> None:
        function(*arguments, *_longs(first, last, rows.shape[1]))

    threads.parallel_for(work, *rows.shape)
    return out


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products [R] of rows [R, width], contiguous and of one dtype, in the wide dtype."""
    wide = torch.promote_types(a.dtype, torch.float32)
    function = _function("dot_rows", a, b)
    if function is None:
        return (a.to(wide) * b.to(wide)).sum(-1)
    found = a.new_empty(a.shape[0], dtype=wide)
    arguments = (pointer(a), pointer(b), pointer(found))

    def work(first: int, last: int) -> None:
        function(*arguments, *_longs(first, last, a.shape[1]))

    threads.parallel_for(work, *a.shape)
    return found


def _times(rows: Tensor, scale: Tensor) -> Tensor:
    return rows.to(scale.dtype) * scale.unsqueeze(-1)


def _function(name: str, rows: Tensor, *others: Tensor) -> ctypes._NamedFuncPointer | None:
    """The C function for the dtype of `rows`, or None."""
    native = _library() if is_plain_cpu(rows, *others) else None
    return None if native is None else getattr(native, f"{name}_{SUFFIXES[rows.dtype]}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiler.load_library(Path(__file__).with_name("rows.c"))
    if library is not None:
        for name in ("add_to_tokens", "scale_rows", "dot_rows"):
            for suffix in SUFFIXES.values():
                getattr(library, f"{name}_{suffix}").restype = None
    return library


def _or_null(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None) if tensor is None else pointer(tensor)


def _longs(*values: int) -> tuple[ctypes.c_long, ...]:
    return tuple(ctypes.c_long(value) for value in values)
