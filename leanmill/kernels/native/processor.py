"""Which 16-bit products torch leaves to instructions of this processor."""

from __future__ import annotations

import functools

import torch


_FLAGS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether `torch.mm` in `dtype` runs on this processor's own instructions; true for fp32 and wider.

    Torch hands such products to oneDNN, which goes by the processor: `ATEN_CPU_CAPABILITY` holds back
    torch's own vector code only.
    """
    if dtype not in _FLAGS:
        return True
    capabilities = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(capabilities.get(flag, False) for flag in _FLAGS[dtype])


@functools.cache
def has_matrix_unit(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies whole tiles of `dtype` (AMX), which torch's products use."""
    flags = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    return dtype in flags and bool(torch.cpu.get_capabilities().get(flags[dtype], False))
