"""Which compute precision the hardware is made for."""

from __future__ import annotations

from typing import Literal

import torch

from leanmill.kernels.native.processor import multiplies_natively


Precision = Literal["fp32", "bf16"]


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device_type: str) -> Precision:
    """Return the precision itself, or for `auto` bf16 where `device_type` multiplies bf16 natively.

    Emulated bf16 is slow: on a CPU without such instructions a matmul runs 8 to 80 times slower in
    bf16 than in fp32. The choice goes by instruction sets, not by a timing, so that a resumed run
    makes it again.
    """
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(device_type) else "fp32"


def has_native_bf16(device_type: str) -> bool:
    """Whether this machine's `cuda` or `cpu` computes bf16 natively in all that training does.

    On x86 that takes more than the processor's instructions for products: attention and the
    element-wise operations are torch's own vector code, which knows bf16 as AVX-512. Where
    `ATEN_CPU_CAPABILITY` asks for less, it is slow, and attention beside AMX products raises.
    """
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    is_x86 = torch.cpu.get_capabilities().get("architecture") in ("x86", "x86_64")
    vectors_fit = not is_x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return vectors_fit and multiplies_natively(torch.bfloat16)
