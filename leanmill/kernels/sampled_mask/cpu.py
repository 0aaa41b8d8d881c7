"""Drawn masks on the CPU in C: one pass where tensor code takes some thirty."""

from __future__ import annotations

import ctypes
import functools
import itertools
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.sampled_mask.draw import Draw


MAX_CANDIDATES, MAX_GROUP_SIZE = 256, 32
"""As in cpu.c."""
_COST = 16
"""A logit costs as much as so many elements of a plain pass: two logarithms and an exponential."""


class _Task(ctypes.Structure):
    """As in cpu.c."""

    _fields_ = (
        ("num_candidates", c_int32),
        ("group_size", c_int32),
        ("kept", c_void_p),
        ("low", c_uint32),
        ("high", c_uint32),
        ("first", c_int64),
        ("scale", c_float),
        ("temperature", c_float),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def forward(weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """Return the contiguous weight [..., in] times its mask."""
    out = large_empty(weight, *weight.shape)
    _run("forward", draw, weight, (pointer(weight), pointer(logits), pointer(out)))
    return out


def backward(
    weight: Tensor, logits: Tensor, grad: Tensor, draw: Draw, pull: float, *, wants_weight: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of the weight, where it is wanted, and of the logits."""
    to_weight = large_empty(weight, *weight.shape) if wants_weight else None
    to_logits = large_empty(logits, *logits.shape)
    written = c_void_p(None) if to_weight is None else pointer(to_weight), pointer(to_logits)
    _run("backward", draw, weight, (pointer(weight), pointer(logits), pointer(grad), c_float(pull), *written))
    return to_weight, to_logits


def _run(name: str, draw: Draw, weight: Tensor, arguments: tuple[Any, ...]) -> None:
    native = library()
    assert native is not None
    function = getattr(native, f"{name}_{SUFFIXES[weight.dtype]}")
    function.restype = None
    kept = _kept(draw.num_kept, draw.group_size)
    task = _Task(
        num_candidates=len(kept),
        group_size=draw.group_size,
        kept=ctypes.addressof(kept),
        low=draw.key & 0xFFFFFFFF,
        high=draw.key >> 32,
        first=draw.first,
        scale=draw.scale,
        temperature=draw.temperature,
    )

    def run(first: int, last: int) -> None:
        function(ctypes.byref(task), *arguments, c_int64(first), c_int64(last))

    threads.parallel_for(run, weight.numel() // draw.group_size, len(kept) * _COST)


@functools.cache
def _kept(num_kept: int, group_size: int) -> ctypes.Array[c_uint32]:
    """Bits of the entries of each candidate, in lexicographic order."""
    ways = [sum(1 << entry for entry in kept) for kept in itertools.combinations(range(group_size), num_kept)]
    return (c_uint32 * len(ways))(*ways)


def covers(weight: Tensor, logits: Tensor, draw: Draw) -> bool:
    """Whether the C code computes this draw; asked of plain CPU tensors."""
    fits = draw.group_size <= MAX_GROUP_SIZE and logits.shape[-1] <= MAX_CANDIDATES
    return fits and logits.dtype == torch.float32 and draw.key >= 0 and library() is not None
