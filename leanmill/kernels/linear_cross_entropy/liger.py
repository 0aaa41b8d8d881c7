"""Liger's fused linear cross-entropy, where it is installed and computes the same (BSD-2, not a dependency)."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from leanmill.kernels.linear_cross_entropy.naive import Form


def covers(device_type: str, dtype: torch.dtype, form: Form, chunk_tokens: int | None, *, is_tracing: bool) -> bool:
    """Whether Liger is taken for a summed loss: on CUDA, for the plain loss, if it is installed.

    Not with a logit scale, cap, z-loss or smoothing, which would have to be equal to the last term in
    every version of it; not with a chunk of the caller's; not while tracing, since it waits for the
    device to count labels.
    """
    plain = form == Form() and chunk_tokens is None and dtype != torch.float64
    return device_type == "cuda" and plain and not is_tracing and is_installed()


@functools.cache
def is_installed() -> bool:
    """Whether `liger_kernel` can be imported; it is not imported to find out."""
    return importlib.util.find_spec("liger_kernel") is not None


def summed(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the sum of cross-entropy over hidden [N, H], differentiable, weight gradients added up in fp32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = liger_fused_linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=ignore_index,
            reduction="sum",
            accum_dtype=torch.float32,
        )
    return total
