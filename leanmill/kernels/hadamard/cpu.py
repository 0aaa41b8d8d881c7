"""The transforms on the CPU in C: butterflies in registers and first-level cache, one pass over memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.hadamard.naive import CLIPS, scale_of
from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer


def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def _loaded() -> ctypes.CDLL:
    functions = library()
    assert functions is not None
    return functions


def hadamard(x: Tensor, mask: Tensor | None, out: Tensor, block_size: int) -> None:
    """Write the transform of contiguous `x` [..., n], zeroed where `mask` is false, to `out`, maybe `x`."""
    native = _loaded()
    length = x.shape[-1]
    function = getattr(native, f"hadamard_{SUFFIXES[x.dtype]}")
    mask_pointer = None if mask is None else pointer(mask)

    def work(first: int, last: int) -> None:
        size = (ctypes.c_int64(value) for value in (first, last, length, block_size))
        function(pointer(x), mask_pointer, pointer(out), *size, ctypes.c_float(scale_of(block_size)))

    threads.parallel_for(work, x.numel() // length, length)


def quest_quantise(x: Tensor, num_levels: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the quantised transform of contiguous `x` [..., n] and its bool trust mask."""
    native = _loaded()
    length = x.shape[-1]
    quantised, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    function = getattr(native, f"quest_{SUFFIXES[x.dtype]}")
    step_of_sigma = 2 * CLIPS[num_levels] / (num_levels - 1)
    failures: list[int] = []

    def work(first: int, last: int) -> None:
        size = (ctypes.c_int64(value) for value in (first, last, length, block_size))
        failed = function(
            pointer(x),
            pointer(quantised),
            pointer(mask),
            *size,
            ctypes.c_float(scale_of(block_size)),
            ctypes.c_double(step_of_sigma),
            ctypes.c_int(num_levels),
        )
        if failed:
            failures.append(first)

    threads.parallel_for(work, x.numel() // length, length)
    if failures:
        raise MemoryError(f"no memory for a row of {length} floats")
    return quantised, mask
