"""Import Triton kernels so that tests can run them: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where tests of Triton kernels put their tensors."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""Kernels load bf16 as fp32, so the interpreter, which cannot compute in bf16, covers it too."""


def kernel_module(name: str) -> ModuleType:
    """Return `leanmill.kernels.<name>.kernel`; Triton decides at decoration whether to interpret."""
    pytest.importorskip("triton")
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        return importlib.import_module(f"leanmill.kernels.{name}.kernel")
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before
