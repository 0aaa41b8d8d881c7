"""Which code computes an operation: C on a CPU, Triton on a GPU, tensor code for the rest; said once each.

What is fast is said to whoever debugs; that an operation is left to tensor code, to everybody.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from enum import StrEnum
from types import ModuleType

import torch
from torch import Tensor

from leanmill.kernels.native.dtypes import SUFFIXES, is_plain_cpu


logger = logging.getLogger(__name__)


class Code(StrEnum):
    """The code of an operation, named by the file of its folder that holds it."""

    C = "cpu"
    TRITON = "kernel"
    TENSORS = "naive"


_SPOKEN = {Code.C: "C", Code.TRITON: "a Triton kernel"}


def choose(
    operation: str,
    *tensors: Tensor,
    c: Callable[[], object] | None,
    triton: Callable[[], bool] = lambda: True,
) -> Code:
    """Return the fastest code that covers the operands, and say so the first time.

    Args:
        operation: What the log calls it.
        tensors: The operands that decide, on one device; those of a floating type must have one that C and
            Triton know (fp32, bf16, fp16).
        c: Whether the C code covers the operands and is there: asked of plain CPU tensors only. None where
            an operation has none.
        triton: Whether the Triton kernel covers the operands: asked only on a CUDA device that has Triton.
    """
    code = fastest(*tensors, c=c, triton=triton)
    first = tensors[0]
    if code is Code.TENSORS:
        log_path(operation, f"tensor code for {first.dtype} on {first.device.type}", logging.INFO)
    else:
        log_path(operation, _SPOKEN[code])
    return code


def fastest(*tensors: Tensor, c: Callable[[], object] | None, triton: Callable[[], bool] = lambda: True) -> Code:
    """Return what `choose` returns, for callers that tell finer paths apart before they say one."""
    floating = [t for t in tensors if t.is_floating_point()]
    if tensors[0].device.type == "cpu":
        return Code.C if c is not None and is_plain_cpu(*floating) and c() else Code.TENSORS
    is_known = all(t.dtype in SUFFIXES for t in floating)
    return Code.TRITON if is_known and on_gpu(tensors[0]) and triton() else Code.TENSORS


def implementation(package: str, code: Code) -> ModuleType:
    """Return the module of an operation's folder that holds `code`."""
    return importlib.import_module(f"{package}.{code}")


@functools.cache
def log_path(operation: str, path: str, level: int = logging.DEBUG) -> None:
    """Say once a process which code an operation takes."""
    logger.log(level, "%s runs as %s", operation, path)


def on_gpu(tensor: Tensor) -> bool:
    """Whether Triton kernels run where `tensor` is: an NVIDIA GPU, and Triton is installed."""
    return tensor.device.type == "cuda" and torch.version.hip is None and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
