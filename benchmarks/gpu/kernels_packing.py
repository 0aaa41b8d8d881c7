"""Transforms and packed weights on a GPU."""

from __future__ import annotations

import functools

import torch
from kernel_case import GpuCase

from leanmill.kernels.hadamard.op import hadamard, quest_quantise
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packing.op import pack


def cases(device: torch.device | str, *, size: int = 8192) -> list[GpuCase]:
    """The cases; `size` is the side of square weights and activations."""
    x = torch.randn(size, size, device=device).bfloat16()
    num_bytes = x.numel() * x.element_size()
    transform, quest = functools.partial(hadamard, x, 128), functools.partial(quest_quantise, x, 4, 128)
    return [
        GpuCase("hadamard_128", transform, num_bytes=2 * num_bytes, least_bandwidth_share=0.85),
        GpuCase("quest_4bit_128", quest, num_bytes=2 * num_bytes + x.numel(), least_bandwidth_share=0.85),
        *_packed_cases(device, size),
    ]


def _packed_cases(device: torch.device | str, size: int) -> list[GpuCase]:
    found = []
    for encoding in (2, 4, "ternary"):
        is_ternary = encoding == "ternary"
        codes = torch.randint(-1 if is_ternary else 0, 2 if is_ternary else 2**encoding, (size, size), device=device)
        packed = pack(codes, encoding)
        scales = torch.rand(size, 1 if is_ternary else max(1, size // 128), device=device)
        token = torch.randn(1, size, device=device).bfloat16()
        run = functools.partial(packed_matmul, token, packed, scales, encoding, int8_activations=is_ternary)
        num_bytes = packed.numel() + (0 if is_ternary else 4 * scales.numel())
        name = f"packed_matmul_{encoding}_1_token"
        found.append(GpuCase(name, run, num_bytes=num_bytes, least_bandwidth_share=0.7))
    return found
