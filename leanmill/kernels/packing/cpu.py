"""Packing on the CPU in C: one pass over the codes, rows on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import pointer
from leanmill.kernels.packing.encoding import code_dtype, packed_length


def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def _loaded() -> ctypes.CDLL:
    functions = library()
    assert functions is not None
    return functions


def pack(codes: Tensor, number: int) -> Tensor | None:
    """Return the packed bytes of uint8 or int8 codes [..., n], or None if one is out of range."""
    native = _loaded()
    codes = codes.contiguous()
    num_codes = codes.shape[-1]
    packed = codes.new_empty((*codes.shape[:-1], packed_length(num_codes, number)), dtype=torch.uint8)
    found_bad: list[int] = []

    def work(first: int, last: int) -> None:
        size = (ctypes.c_int64(value) for value in (first, last, num_codes))
        if native.pack(pointer(codes), pointer(packed), *size, ctypes.c_int(number)):
            found_bad.append(first)

    if codes.numel():
        threads.parallel_for(work, codes.numel() // num_codes, num_codes)
    return None if found_bad else packed


def unpack(packed: Tensor, number: int, num_codes: int) -> Tensor:
    """Return codes [..., num_codes] of uint8 `packed`."""
    native = _loaded()
    packed = packed.contiguous()
    codes = packed.new_empty((*packed.shape[:-1], num_codes), dtype=code_dtype(number))

    def work(first: int, last: int) -> None:
        size = (ctypes.c_int64(value) for value in (first, last, num_codes))
        native.unpack(pointer(packed), pointer(codes), *size, ctypes.c_int(number))

    if codes.numel():
        threads.parallel_for(work, codes.numel() // num_codes, num_codes)
    return codes
