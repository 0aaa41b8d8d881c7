"""Transforms and packed weights against what they replace."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from kernel_case import Case, compiled
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.hadamard import naive as hadamard_naive
from leanmill.kernels.hadamard.op import hadamard
from leanmill.kernels.packed_matmul import naive
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packed_matmul.prepacked import PrepackedWeight, prepack, prepacked_matmul
from leanmill.kernels.packing import naive as packing_naive
from leanmill.kernels.packing.encoding import Encoding, number_of
from leanmill.kernels.packing.op import pack, unpack


SIZE = 4096
GROUP = 128
TOKENS = (1, 16, 256)


def cases() -> list[Case]:
    return [_hadamard_case(), *_packing_cases(), *_packed_cases(), *_prepacked_cases()]


def _hadamard_case() -> Case:
    x, matrix = torch.randn(SIZE, 1024), hadamard_naive.hadamard_matrix(1024, dtype=torch.float32)
    define = compiled(hadamard_naive.hadamard)
    return Case(
        "hadamard",
        lambda: hadamard(x),
        lambda: x @ matrix,
        "dense matmul",
        0.5,
        "4096 x 1024, fp32",
        definition=lambda: define(x, 1024),
    )


def _packing_cases() -> list[Case]:
    found = []
    for encoding in (2, "ternary"):
        codes, number = _codes(encoding), number_of(encoding)
        packed, what = pack(codes, encoding), f"{SIZE} x {SIZE} codes, {encoding if number == 3 else '2 bits'}"
        define_pack, define_unpack = compiled(packing_naive.pack), compiled(packing_naive.unpack)
        found += [
            Case(
                f"pack_{encoding}",
                functools.partial(pack, codes, encoding),
                functools.partial(packing_naive.pack, codes, number),
                "shifts or powers, and sums, of torch",
                0.5,
                what,
                rounds=9,
                definition=functools.partial(define_pack, codes, number),
            ),
            Case(
                f"unpack_{encoding}",
                functools.partial(unpack, packed, encoding, SIZE),
                functools.partial(packing_naive.unpack, packed, number, SIZE),
                "shifts or products, and masks, of torch",
                0.5,
                what,
                rounds=9,
                definition=functools.partial(define_unpack, packed, number, SIZE),
            ),
        ]
    return found


def _codes(encoding: Encoding) -> Tensor:
    first, last = (-1, 2) if encoding == "ternary" else (0, 2**encoding)
    return torch.randint(first, last, (SIZE, SIZE), dtype=torch.int8 if encoding == "ternary" else torch.uint8)


def _by_definition(
    x: Tensor, packed: Tensor, scales: Tensor, encoding: Encoding, zero: float, int8_activations: bool = False
) -> Callable[[], object]:
    """The naive product, compiled."""

    def int8_matmul(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        codes, token_scales = naive.quantise_tokens(x)
        return naive.ternary_int8_matmul(codes, packed) * token_scales * scales.t()

    if int8_activations:
        return functools.partial(compiled(int8_matmul), x, packed, scales)
    zeros = torch.full_like(scales, zero)
    return functools.partial(compiled(naive.packed_matmul), x, packed, scales, zeros, number_of(encoding))


def _unpacked_matmul(x: Tensor, packed: Tensor, scales: Tensor, encoding: int | str, zero: float) -> Tensor:
    codes = unpack(packed, encoding, x.shape[-1]).to(x.dtype).sub_(zero)
    return F.linear(x, codes.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1)).flatten(-2))


def _packed_cases() -> list[Case]:
    found = []
    for encoding, zero, num_groups in ((2, 2.0, SIZE // GROUP), (4, 8.0, SIZE // GROUP), ("ternary", 0.0, 1)):
        is_ternary = encoding == "ternary"
        packed, scales = pack(_codes(encoding), encoding), torch.rand(SIZE, num_groups)
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, SIZE)
            kind = "ternary_int8" if is_ternary else f"{encoding}bit"
            ours = functools.partial(packed_matmul, x, packed, scales, encoding, int8_activations=is_ternary)
            peer = functools.partial(_unpacked_matmul, x, packed, scales, encoding, zero)
            name = f"packed_matmul_{kind}_{num_tokens}_tokens"
            definition = _by_definition(x, packed, scales, encoding, zero, is_ternary)
            found.append(
                Case(
                    name,
                    ours,
                    peer,
                    "unpack, then matmul",
                    0.8 if num_tokens == TOKENS[-1] else 1.0,
                    "4096 x 4096, fp32",
                    rounds=9,
                    definition=definition,
                )
            )
    return found


def _torch_matmul(x: Tensor, weight: PrepackedWeight) -> Tensor:
    if weight.num_bits == 8:
        return torch._weight_int8pack_mm(x, weight.layout, weight.layout_scales)
    return torch._weight_int4pack_mm_for_cpu(x, weight.layout, GROUP, weight.layout_scales)


def _prepacked_cases() -> list[Case]:
    found = []
    for num_bits, num_groups in ((4, SIZE // GROUP), (8, 1)):
        packed = pack(_codes(num_bits), num_bits)
        scales = torch.rand(SIZE, num_groups).bfloat16()
        weight = prepack(packed, scales, num_bits)
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, SIZE).bfloat16()
            ours = functools.partial(prepacked_matmul, x, weight)
            peer = functools.partial(_unpacked_matmul, x, packed, scales, num_bits, 2.0 ** (num_bits - 1))
            theirs = functools.partial(_torch_matmul, x, weight)
            name = f"packed_matmul_{num_bits}bit_bf16_{num_tokens}_tokens"
            conditions = "4096 x 4096, bf16, prepacked"
            definition = _by_definition(x, packed, scales, num_bits, 2.0 ** (num_bits - 1))
            found.append(
                Case(name, ours, peer, "unpack, then matmul", 1.0, conditions, rounds=9, definition=definition)
            )
            kernel = f"torch's int{num_bits} kernel"
            found.append(Case(f"{name}_by_torch", ours, theirs, kernel, 1.1, conditions, rounds=9))
    return found
