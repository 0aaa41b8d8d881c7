"""Names that C functions carry for each element type, and the pointers they take."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Element types the C code covers; fp64 goes through tensor code."""


def pointer(tensor: Tensor, offset: int = 0) -> ctypes.c_void_p:
    """Return the address of element `offset` of a contiguous tensor in CPU memory."""
    return ctypes.c_void_p(tensor.data_ptr() + offset * tensor.element_size())


def is_plain_cpu(*tensors: Tensor) -> bool:
    """Whether all are ordinary CPU tensors in a type the C code covers, outside of tracing."""
    return not torch.compiler.is_compiling() and all(
        type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype in SUFFIXES for t in tensors
    )
