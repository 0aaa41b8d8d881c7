"""Divergence and gradient of rows of logits on the CPU, in place, by C code."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.linear_kl.naive import KINDS, Form, with_tail
from leanmill.kernels.native import compiler, dtypes, threads


_SOURCE = Path(__file__).with_name("cpu.c")
_BLOCK = 1024
"""Of the C code: buckets of a cache are padded to whole blocks."""


class _Form(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("beta", ctypes.c_float),
        ("inverse", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("divergence_weight", ctypes.c_float),
        ("cross_entropy_weight", ctypes.c_float),
        ("wants_cross_entropy", ctypes.c_int),
        ("wants_gradient", ctypes.c_int),
    )


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(_SOURCE)


def divergence_(
    raw: Tensor, teacher: Tensor, labels: Tensor, form: Form, *, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Do what `rows.divergence_` does; labels must lie below the number of columns if cross-entropy is wanted."""
    teacher = teacher.contiguous()
    given = (dtypes.pointer(teacher), ctypes.c_int(list(dtypes.SUFFIXES).index(teacher.dtype)))
    widths = (raw.shape[-1], teacher.shape[-1])
    return _run("divergence", raw, given, labels, form, wants_gradient, widths)


def top_k_divergence_(
    raw: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    log_tail: Tensor | None,
    labels: Tensor,
    form: Form,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `rows.top_k_divergence_` does; labels as above."""
    log_p = with_tail(log_probs, log_tail, raw.shape[-1]).float().contiguous()
    indices = indices.contiguous()
    num_taken = indices.shape[-1]
    padded = -(-(num_taken + 1) // _BLOCK) * _BLOCK
    space = torch.empty(len(raw), 5 * padded)
    pointers = (dtypes.pointer(indices), dtypes.pointer(log_p), dtypes.pointer(space))
    sizes = (ctypes.c_int64(num_taken), ctypes.c_int64(padded))
    return _run("top_k_divergence", raw, (*pointers, *sizes), labels, form, wants_gradient, (raw.shape[-1],))


def _run(
    name: str,
    raw: Tensor,
    teacher: tuple[object, ...],
    labels: Tensor,
    form: Form,
    wants_gradient: bool,
    widths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    compiled = library()
    assert compiled is not None
    function = getattr(compiled, f"{name}_{dtypes.SUFFIXES[raw.dtype]}")
    weight, labels = form.cross_entropy_weight, labels.contiguous()
    settings = _Form(
        KINDS.index(form.kind),
        form.beta,
        1 / form.temperature,
        form.temperature,
        form.divergence_weight,
        weight or 0.0,
        weight is not None,
        wants_gradient,
    )
    losses = torch.empty(2, len(raw))
    given = (
        dtypes.pointer(raw),
        *teacher,
        dtypes.pointer(labels),
        dtypes.pointer(losses[0]),
        dtypes.pointer(losses[1]),
    )

    def rows(first: int, last: int) -> None:
        bounds = [ctypes.c_int64(value) for value in (first, last, *widths)]
        function(*given, *bounds, ctypes.byref(settings))

    threads.parallel_for(rows, len(raw), raw.shape[-1])
    return losses[0], losses[1]
