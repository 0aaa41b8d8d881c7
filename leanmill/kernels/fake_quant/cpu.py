"""Fake quantisation on the CPU through C: one pass forward, one pass for all gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, Grid
from leanmill.kernels.native import compiler
from leanmill.kernels.native.dtypes import SUFFIXES, pointer
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.native.threads import parallel_for


_BLOCK = 1024
"""`BLOCK_MAX` of cpu.c."""
_BLOCKS_PER_SEGMENT = 4
"""Summed in fp32 on 16 lanes, 256 numbers each."""


class _Task(ctypes.Structure):
    """`task_t` of cpu.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("group_length", "segment_length", "segments_per_group")),
        *((name, ctypes.c_void_p) for name in ("scale", "offset")),
        *((n, ctypes.c_float) for n in ("low", "high", "shift", "edge_low", "edge_high", "smallest_scale")),
        ("straight_through", ctypes.c_int32),
    ]


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there is no compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def _loaded() -> ctypes.CDLL:
    functions = library()
    assert functions is not None
    return functions


def forward(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    *,
    in_threads: bool = True,
) -> Tensor:
    """`naive.forward` for a contiguous CPU weight."""
    task, keep = _task(weight, scale, offset, grid)
    out = large_empty(weight, *weight.shape)
    function = getattr(_loaded(), f"fake_quant_forward_{SUFFIXES[weight.dtype]}")
    arguments = ctypes.byref(task), pointer(weight), pointer(out)

    def run(first: int, last: int) -> None:
        function(*arguments, ctypes.c_int64(first), ctypes.c_int64(last))

    _share(run, keep[0].numel() * task.segments_per_group, min(task.segment_length, task.group_length), in_threads)
    return out


def gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    grad_scale: float,
    straight_through: bool,
    needs_weight: bool,
    *,
    in_threads: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`naive.gradients` for contiguous CPU tensors; no weight gradient is written unless needed."""
    task, keep = _task(weight, scale, offset, grid)
    task.straight_through = int(straight_through)
    out = large_empty(weight, *weight.shape) if needs_weight else None
    num_segments = keep[0].numel() * task.segments_per_group
    sums = torch.empty(2, num_segments, dtype=torch.float32)
    function = getattr(_loaded(), f"fake_quant_backward_{SUFFIXES[weight.dtype]}")
    tensors = pointer(grad), pointer(weight), None if out is None else pointer(out)
    arguments = ctypes.byref(task), *tensors, pointer(sums), pointer(sums, num_segments)

    def run(first: int, last: int) -> None:
        function(*arguments, ctypes.c_int64(first), ctypes.c_int64(last))

    _share(run, num_segments, min(task.segment_length, task.group_length), in_threads)
    totals = sums.view(2, -1, task.segments_per_group)
    totals = totals.sum(-1, dtype=torch.float64) if task.segments_per_group > 1 else totals
    totals = totals.mul(grad_scale)
    # Copies: an operator's outputs may not share memory.
    scale_grad = totals[0].to(scale.dtype, copy=True).view(scale.shape)
    return out, scale_grad, None if offset is None else totals[1].to(offset.dtype, copy=True).view(offset.shape)


def activations(tokens: Tensor, smallest: float, *, as_codes: bool) -> tuple[Tensor, Tensor]:
    """Codes, or fake-quantised values, of contiguous tokens [..., in], and steps [..., 1]."""
    steps = torch.empty(*tokens.shape[:-1], 1, dtype=torch.float32)
    out = large_empty(tokens, *tokens.shape, dtype=torch.int8 if as_codes else tokens.dtype)
    function = getattr(_loaded(), f"int8_activations_{SUFFIXES[tokens.dtype]}")
    codes, values = (pointer(out), None) if as_codes else (None, pointer(out))
    length = ctypes.c_int64(tokens.shape[-1])
    arguments = pointer(tokens), codes, pointer(steps), values, length, ctypes.c_float(smallest)

    def run(first: int, last: int) -> None:
        function(*arguments, ctypes.c_int64(first), ctypes.c_int64(last))

    parallel_for(run, steps.numel(), tokens.shape[-1])
    return out, steps


def _share(run: Callable[[int, int], None], num_segments: int, length: int, in_threads: bool) -> None:
    if in_threads:
        parallel_for(run, num_segments, length)
    else:
        run(0, num_segments)


def _task(weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> tuple[_Task, list[Tensor]]:
    """The arguments that all segments share, and the tensors that have to outlive the call."""
    keep = [t.detach().to(torch.float32).contiguous() for t in (scale, offset) if t is not None]
    group_length = weight.numel() // scale.numel()
    segment_length = _BLOCK * _BLOCKS_PER_SEGMENT
    low, high = grid.edges
    task = _Task(
        group_length=group_length,
        segment_length=segment_length,
        segments_per_group=-(-group_length // segment_length),
        scale=pointer(keep[0]),
        offset=None if offset is None else pointer(keep[1]),
        low=grid.low,
        high=grid.high,
        shift=grid.shift,
        edge_low=low,
        edge_high=high,
        smallest_scale=SMALLEST_SCALE,
    )
    return task, keep
