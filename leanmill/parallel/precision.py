"""Which compute precision the hardware is made for."""

from __future__ import annotations

from typing import Literal

import torch


Precision = Literal["fp32", "bf16"]


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device_type: str) -> Precision:
    """Return the precision itself, or for `auto` bf16 where `device_type` multiplies bf16 natively.

    Emulated bf16 is slow: on a CPU without such instructions a matmul runs 8 to 80 times slower in
    bf16 than in fp32. The choice goes by instruction set, not by a timing, so that a resumed run
    makes it again.
    """
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(device_type) else "fp32"


def has_native_bf16(device_type: str) -> bool:
    """Whether this machine's `cuda` or `cpu` has bf16 matrix or dot-product instructions."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
