"""W + s B A in plain tensor code, differentiable by autograd: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def lowrank_delta(weight: Tensor, a: Tensor, b: Tensor, scaling: float, core: Tensor | None = None) -> Tensor:
    """Return weight + scaling * b @ core @ a in the weight's dtype, see `op.lowrank_delta`.

    The product and the sum are computed in the wider of the dtypes given and rounded once.
    """
    dtype = compute_dtype(weight, a, b, core)
    with as_given(weight):
        left = b.to(dtype) if core is None else b.to(dtype) @ core.to(dtype)
        return (weight.to(dtype) + scaling * (left @ a.to(dtype))).to(weight.dtype)


def as_given(tensor: Tensor) -> torch.autocast:
    """Autocast off: it would round the product to bf16, and an exported weight would not be the trained one."""
    return torch.autocast(tensor.device.type, enabled=False)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype of those given."""
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
