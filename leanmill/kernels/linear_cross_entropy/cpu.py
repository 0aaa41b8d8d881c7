"""Loss and gradient of rows of logits on the CPU, in place, by C code."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.linear_cross_entropy.naive import Form
from leanmill.kernels.native import compiler, dtypes, threads


_SOURCE = Path(__file__).with_name("cpu.c")


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(_SOURCE)


def cross_entropy_(
    raw: Tensor, labels: Tensor, row_scales: Tensor | None, form: Form, *, wants_gradient: bool
) -> Tensor:
    """Do what `naive.cross_entropy_` does; labels must lie below the number of columns."""
    logits = raw
    if form.softcap:
        # tanh of fp32 whatever the dtype: the rows hold tanh(scale x / softcap) from here on.
        logits = raw.to(torch.float32, copy=not wants_gradient).mul_(form.scale / form.softcap).tanh_()
    losses = torch.empty(len(raw), dtype=torch.float32)
    scales = None if row_scales is None else row_scales.float().contiguous()
    _run(logits, labels.contiguous(), scales, losses, form, wants_gradient)
    if wants_gradient and logits is not raw:
        raw.copy_(logits)
    return losses


def _run(
    logits: Tensor,
    labels: Tensor,
    scales: Tensor | None,
    losses: Tensor,
    form: Form,
    wants_gradient: bool,
) -> None:
    library = compiler.load_library(_SOURCE)
    assert library is not None
    function = getattr(library, f"cross_entropy_{dtypes.SUFFIXES[logits.dtype]}")
    width = logits.shape[-1]
    pointers = [dtypes.pointer(logits), dtypes.pointer(labels), None if scales is None else dtypes.pointer(scales)]
    settings = [ctypes.c_float(v) for v in (form.scale, form.softcap, form.z_loss, form.label_smoothing)]

    def rows(first: int, last: int) -> None:
        bounds = [ctypes.c_int64(value) for value in (first, last, width)]
        function(*pointers, dtypes.pointer(losses), *bounds, *settings, ctypes.c_int(wants_gradient))

    threads.parallel_for(rows, len(logits), width)
