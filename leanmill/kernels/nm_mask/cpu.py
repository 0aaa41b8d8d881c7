"""N:M masks on the CPU in C, one pass over the weight on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.nm_mask.naive import index_bits, packed_width


_MASK, _PROJECT, _DECAY = range(3)
"""What `nm_groups` and `nm_tiles` write; the enum in cpu.c."""
_TILE = 4
_STREAMED_FROM_BYTES = 2**25
"""Outputs this large do not stay in the caches of a core's neighbourhood anyway."""


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def nm_mask(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    """Return the bool mask [..., in] of `naive.nm_mask`."""
    mask = large_empty(weight, *weight.shape, dtype=torch.bool)
    _run(_MASK, weight, None, mask, num_kept, group_size, transposable)
    return mask


def project(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    """Return the weight [..., in] with 0.0 for what the mask prunes."""
    out = large_empty(weight, *weight.shape)
    _run(_PROJECT, weight, None, out, num_kept, group_size, transposable)
    return out


def decayed_grad(
    grad: Tensor, weight: Tensor, decay: Tensor, num_kept: int, group_size: int, transposable: bool
) -> Tensor:
    """Return g + decay * (1 - M) * W [..., in]."""
    out = large_empty(weight, *weight.shape)
    _run(_DECAY, weight, grad.contiguous(), out, num_kept, group_size, transposable, float(decay))
    return out


def compress(weight: Tensor, num_kept: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return kept values [..., in * N / M] and packed indices, uint8 [..., bytes]."""
    num_groups = weight.shape[-1] // group_size
    num_values = num_groups * num_kept
    values = torch.empty(*weight.shape[:-1], num_values, dtype=weight.dtype)
    indices = torch.empty(*weight.shape[:-1], packed_width(num_values, group_size), dtype=torch.uint8)
    _run_rows("compress", (weight.contiguous(), values, indices), num_groups, num_kept, group_size)
    return values, indices


def expand(values: Tensor, indices: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return the weight [..., in] whose kept entries are `values`, 0.0 elsewhere."""
    num_groups = values.shape[-1] // num_kept
    weight = torch.empty(*values.shape[:-1], num_groups * group_size, dtype=values.dtype)
    _run_rows("expand", (values.contiguous(), indices.contiguous(), weight), num_groups, num_kept, group_size)
    return weight


def _run(
    what: int,
    weight: Tensor,
    grad: Tensor | None,
    out: Tensor,
    num_kept: int,
    group_size: int,
    transposable: bool,
    decay: float = 0.0,
) -> None:
    if out.numel() == 0:
        return
    weight = weight.contiguous()
    function = _function("tiles" if transposable else "groups", weight.dtype)
    width = weight.shape[-1]
    unit = _TILE * width if transposable else group_size
    is_streamed = c_int(out.nbytes >= _STREAMED_FROM_BYTES)
    last = (c_int64(width),) if transposable else (c_int(num_kept), c_int(group_size))
    pointers = (pointer(weight), c_void_p(None) if grad is None else pointer(grad), pointer(out))

    def work(first: int, end: int) -> None:
        function(c_int(what), is_streamed, *pointers, c_int64(first), c_int64(end), *last, c_float(decay))

    threads.parallel_for(work, weight.numel() // unit, unit)


def _run_rows(
    name: str, tensors: tuple[Tensor, Tensor, Tensor], num_groups: int, num_kept: int, group_size: int
) -> None:
    num_rows = tensors[0].shape[:-1].numel()
    if num_rows == 0 or num_groups == 0:
        return
    function = _function(name, tensors[0].dtype)
    sizes = (c_int64(num_groups), c_int(num_kept), c_int(group_size), c_int(index_bits(group_size)))
    pointers = [pointer(tensor) for tensor in tensors]

    def work(first: int, end: int) -> None:
        function(*pointers, c_int64(first), c_int64(end), *sizes)

    threads.parallel_for(work, num_rows, num_groups * group_size)


def _function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    function = getattr(library(), f"nm_{name}_{SUFFIXES[dtype]}")
    function.restype = None
    return function  # type: ignore[no-any-return]
