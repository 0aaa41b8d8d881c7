"""Transforms and packed weights against what they replace."""

from __future__ import annotations

import functools

import torch
from kernel_case import Case
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.hadamard.naive import hadamard_matrix
from leanmill.kernels.hadamard.op import hadamard
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packed_matmul.prepacked import PrepackedWeight, prepack, prepacked_matmul
from leanmill.kernels.packing.op import pack, unpack


SIZE = 4096
GROUP = 128
TOKENS = (1, 16, 256)


def cases() -> list[Case]:
    return [_hadamard_case(), *_packed_cases(), *_prepacked_cases()]


def _hadamard_case() -> Case:
    x, matrix = torch.randn(SIZE, 1024), hadamard_matrix(1024, dtype=torch.float32)
    return Case("hadamard", lambda: hadamard(x), lambda: x @ matrix, "dense matmul", 0.5, "4096 x 1024, fp32")


def _unpacked_matmul(x: Tensor, packed: Tensor, scales: Tensor, encoding: int | str, zero: float) -> Tensor:
    codes = unpack(packed, encoding, x.shape[-1]).to(x.dtype).sub_(zero)
    return F.linear(x, codes.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1)).flatten(-2))


def _packed_cases() -> list[Case]:
    found = []
    for encoding, zero, num_groups in ((2, 2.0, SIZE // GROUP), (4, 8.0, SIZE // GROUP), ("ternary", 0.0, 1)):
        is_ternary = encoding == "ternary"
        codes = torch.randint(-1, 2, (SIZE, SIZE)) if is_ternary else torch.randint(0, 2**encoding, (SIZE, SIZE))
        packed, scales = pack(codes, encoding), torch.rand(SIZE, num_groups)
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, SIZE)
            kind = "ternary_int8" if is_ternary else f"{encoding}bit"
            ours = functools.partial(packed_matmul, x, packed, scales, encoding, int8_activations=is_ternary)
            peer = functools.partial(_unpacked_matmul, x, packed, scales, encoding, zero)
            name = f"packed_matmul_{kind}_{num_tokens}_tokens"
            found.append(Case(name, ours, peer, "unpack, then matmul", 1.0, "4096 x 4096, fp32", rounds=9))
    return found


def _torch_matmul(x: Tensor, weight: PrepackedWeight) -> Tensor:
    if weight.num_bits == 8:
        return torch._weight_int8pack_mm(x, weight.layout, weight.layout_scales)
    return torch._weight_int4pack_mm_for_cpu(x, weight.layout, GROUP, weight.layout_scales)


def _prepacked_cases() -> list[Case]:
    found = []
    for num_bits, num_groups in ((4, SIZE // GROUP), (8, 1)):
        packed = pack(torch.randint(0, 2**num_bits, (SIZE, SIZE)), num_bits)
        scales = torch.rand(SIZE, num_groups).bfloat16()
        weight = prepack(packed, scales, num_bits)
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, SIZE).bfloat16()
            ours = functools.partial(prepacked_matmul, x, weight)
            peer = functools.partial(_unpacked_matmul, x, packed, scales, num_bits, 2.0 ** (num_bits - 1))
            theirs = functools.partial(_torch_matmul, x, weight)
            name = f"packed_matmul_{num_bits}bit_bf16_{num_tokens}_tokens"
            conditions = "4096 x 4096, bf16, prepacked"
            found.append(Case(name, ours, peer, "unpack, then matmul", 1.0, conditions, rounds=9))
            kernel = f"torch's int{num_bits} kernel"
            found.append(Case(f"{name}_by_torch", ours, theirs, kernel, 1.1, conditions, rounds=9))
    return found
