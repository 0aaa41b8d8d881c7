"""Ternary levels on the CPU through C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.native import compiler
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.native.threads import parallel_for


_SEGMENT = 16_384


class _Task(ctypes.Structure):
    """`task_t` of cpu.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("group_length", "segment_length", "segments_per_group")),
        *((name, ctypes.c_void_p) for name in ("level", "divisor", "threshold")),
    ]


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there is no compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def _loaded() -> ctypes.CDLL:
    functions = library()
    assert functions is not None
    return functions


def magnitude_sums(weight: Tensor, group_length: int, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum (fp64) and number (int64) of |w| above `threshold` [groups], all without one, in every group [groups]."""
    task = _task(group_length, threshold=threshold)
    num_segments = weight.numel() // group_length * task.segments_per_group
    sums, counts = torch.empty(num_segments, dtype=torch.float64), torch.empty(num_segments, dtype=torch.int64)
    _run("magnitude_sums", task, weight, num_segments, pointer(sums), pointer(counts))
    shape = (-1, task.segments_per_group)
    return sums.view(shape).sum(-1), counts.view(shape).sum(-1)


def ternary_levels(weight: Tensor, group_length: int, level: Tensor, divisor: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) * level where |w| / divisor > threshold and 0 elsewhere; all fp32 [groups]."""
    task = _task(group_length, level=level, divisor=divisor, threshold=threshold)
    out = large_empty(weight, *weight.shape)
    _run("ternary_levels", task, weight, level.numel() * task.segments_per_group, pointer(out))
    return out


def _run(name: str, task: _Task, weight: Tensor, num_segments: int, *outputs: ctypes.c_void_p) -> None:
    function: Callable[..., Any] = getattr(_loaded(), f"{name}_{SUFFIXES[weight.dtype]}")
    arguments = ctypes.byref(task), pointer(weight), *outputs

    def run(first: int, last: int) -> None:
        function(*arguments, ctypes.c_int64(first), ctypes.c_int64(last))

    parallel_for(run, num_segments, min(task.segment_length, task.group_length))


def _task(group_length: int, **values: Tensor | None) -> _Task:
    """`values` are contiguous fp32 that the caller keeps alive."""
    pointers = {name: None if value is None else pointer(value) for name, value in values.items()}
    return _Task(
        group_length=group_length,
        segment_length=_SEGMENT,
        segments_per_group=-(-group_length // _SEGMENT),
        **pointers,
    )
