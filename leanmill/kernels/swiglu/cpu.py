"""The gate on the CPU in C: one pass where tensor code takes three forward and six backward."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.native.large_pages import large_empty


_EXPONENTIAL_COST = 8
"""An element costs as much as this many of a plain pass."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `naive.swiglu` of contiguous rows [N, 2I]."""
    out = large_empty(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)
    _run("forward", gate_up, out)
    return out


def backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return `naive.backward` for contiguous rows [N, 2I]."""
    out = large_empty(gate_up, *gate_up.shape)
    _run("backward", gate_up, grad, out)
    return out


def _run(name: str, gate_up: Tensor, *others: Tensor) -> None:
    native = library()
    assert native is not None
    function = native[f"{name}_{SUFFIXES[gate_up.dtype]}"]
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    addresses = [pointer(gate_up), *map(pointer, others)]

    def run(first: int, last: int) -> None:
        function(*addresses, ctypes.c_long(first), ctypes.c_long(last), ctypes.c_long(width))

    threads.parallel_for(run, num_rows, width * _EXPONENTIAL_COST)
