"""Import Triton kernels so that tests can run them: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where tests of Triton kernels put their tensors."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""Kernels load bf16 as fp32, so the interpreter, which cannot compute in bf16, covers it too."""


def kernel_module(name: str, file: str = "kernel") -> ModuleType:
    """Return `leanmill.kernels.<name>.<file>`; Triton decides at decoration whether to interpret."""
    pytest.importorskip("triton")
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        return importlib.import_module(f"leanmill.kernels.{name}.{file}")
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Fill what is allocated from now on with NaN, or 7 where that does not exist.

    Returns:
        Shapes allocated, so that a test can tell that its memory was poisoned.
    """
    shapes: list[torch.Size] = []

    def poison(out: Tensor) -> Tensor:
        shapes.append(out.shape)
        return out.fill_(float("nan") if out.is_floating_point() else 7)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _allocate=allocate, **kw: poison(_allocate(*args, **kw)))
    return shapes
