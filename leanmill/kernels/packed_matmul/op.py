"""Public entry: `packed_matmul`."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose, implementation
from leanmill.kernels.native.processor import multiplies_natively
from leanmill.kernels.packed_matmul import cpu, naive
from leanmill.kernels.packing.encoding import TERNARY, Encoding, number_of, packed_length
from leanmill.kernels.sharded import is_dtensor


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIDDLE = {1: 0.5, 2: 2.0, 4: 8.0, 8: 128.0, TERNARY: 0.0}


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    encoding: Encoding,
    *,
    zero_points: Tensor | float | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """Return x @ W^T for a weight W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g] held packed.

    For evaluation: not differentiable. Group g covers in / groups neighbours along `in`. Products and
    sums are fp32 (fp64 for fp64) and rounded once to the dtype of `x`. W itself is rounded to it where
    many tokens run on instructions for products in a 16-bit type, as in a linear of that type, and
    otherwise not.

    With `int8_activations` (ternary only, BitNet b1.58, arXiv:2402.17764) every token is first rounded
    to int8, a = round(x * 127 / max|x|) clipped to -128 .. 127 with max|x| at least 1e-5; the products
    a @ codes^T are exact int32 and y = products * (max|x| / 127) * scale.

    Args:
        x: Floating [..., in].
        packed: uint8 [out, ceil(in / codes per byte)], what `packing.pack` returns for codes [out, in].
        scales: Floating [out, groups], [out] or one element; groups divide `in`.
        encoding: 1, 2, 4, 8 or "ternary".
        zero_points: Like `scales`, or one number for all; None is the middle: 0.5 for 1 bit (codes 0 and 1),
            2, 8, 128 for 2, 4, 8 bits, 0 for ternary (codes -1 .. 1). 1.5 makes 2 bits a mid-rise grid.
        int8_activations: See above; takes one scale a row or in all, and no zero points.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, DTensors, or int8 activations otherwise.
    """
    number = number_of(encoding)
    _check(x, packed, scales, number)
    tokens = x.reshape(-1, x.shape[-1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scales = per_row(scales, packed, x.shape[-1], "scales").to(wide)
    if int8_activations:
        if number != TERNARY or zero_points is not None or scales.shape[1] != 1:
            raise ValueError(
                f"int8_activations with encoding {encoding!r}, zero_points {zero_points!r} and scales "
                f"{tuple(scales.shape)}; allowed: 'ternary', None and [out, 1] or one element"
            )
        codes, token_scales = torch.ops.leanmill.quantise_tokens(tokens)
        products = torch.ops.leanmill.ternary_int8_matmul(codes, packed)
        out = (products * token_scales * scales.t()).to(x.dtype)
    else:
        if isinstance(zero_points, Tensor):
            zeros = per_row(zero_points, packed, x.shape[-1], "zero_points").to(wide).expand_as(scales)
        else:
            zeros = torch.full_like(scales, MIDDLE[number] if zero_points is None else float(zero_points))
        out = torch.ops.leanmill.packed_matmul(tokens, packed, scales, zeros, number)
    return out.view(*x.shape[:-1], packed.shape[0])


def _check(x: Tensor, packed: Tensor, scales: Tensor, number: int) -> None:
    if any(map(is_dtensor, (x, packed, scales))):
        raise ValueError("DTensors are not multiplied packed; gather them first: tensor.full_tensor()")
    if x.dtype not in DTYPES or x.dim() == 0 or not scales.is_floating_point() or packed.dtype != torch.uint8:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, packed {packed.dtype}, scales {scales.dtype}; allowed: x fp32, bf16, "
            f"fp16 or fp64 [..., in], packed uint8 and floating scales"
        )
    if packed.dim() != 2 or packed.shape[1] != packed_length(x.shape[-1], number):
        raise ValueError(
            f"packed {tuple(packed.shape)} does not fit x {tuple(x.shape)}; it must be "
            f"[out, {packed_length(x.shape[-1], number)}] for in = {x.shape[-1]}"
        )
    if not x.device == packed.device == scales.device:
        raise ValueError(f"x is on {x.device}, packed on {packed.device}, scales on {scales.device}; move to one")


def per_row(values: Tensor, packed: Tensor, num_codes: int, name: str) -> Tensor:
    """Return [out, groups]."""
    if values.numel() == 1:
        values = values.reshape(1, 1).expand(packed.shape[0], 1)
    elif values.dim() == 1:
        values = values.unsqueeze(1)
    num_groups = values.shape[-1]
    if values.dim() != 2 or values.shape[0] != packed.shape[0] or num_groups == 0 or num_codes % num_groups:
        raise ValueError(
            f"{name} {tuple(values.shape)} do not fit packed {tuple(packed.shape)} with in = {num_codes}; "
            f"allowed: [out, groups] with groups dividing in, [out], or one element"
        )
    return values


@torch.library.custom_op("leanmill::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor:
    if x.numel() == 0 or packed.shape[0] == 0:
        return x.new_zeros((x.shape[0], packed.shape[0]))

    def fits_a_kernel() -> bool:
        from leanmill.kernels.packed_matmul import kernel

        return kernel.is_supported(x.shape[-1], scales.shape[-1], number)

    code = choose("packed_matmul", x, c=cpu.library, triton=fits_a_kernel)
    if code is not Code.C:
        return implementation(__package__, code).packed_matmul(x, packed, scales, zero_points, number)  # type: ignore[no-any-return]
    weight = [tensor.contiguous() for tensor in (packed, scales, zero_points)]
    if x.dtype == torch.bfloat16 and x.shape[0] > cpu.MOST_BLOCK_TOKENS and multiplies_natively(x.dtype):
        return cpu.rounded_matmul(x, weight[0], weight[1], weight[2], number)
    return cpu.packed_matmul(x.float().contiguous(), weight[0], weight[1], weight[2], number).to(x.dtype)


@torch.library.custom_op("leanmill::quantise_tokens", mutates_args=())
def _quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    is_in_c = x.numel() and choose("quantise_tokens", x, c=cpu.library, triton=lambda: False) is Code.C
    return cpu.quantise_tokens(x.float().contiguous()) if is_in_c else naive.quantise_tokens(x)


@_quantise_tokens.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("leanmill::ternary_int8_matmul", mutates_args=())
def _ternary_int8_matmul(codes: Tensor, packed: Tensor) -> Tensor:
    if codes.numel() == 0 or packed.shape[0] == 0:
        return codes.new_zeros((codes.shape[0], packed.shape[0]), dtype=torch.int32)
    code = choose("ternary_int8_matmul", codes, c=cpu.library)
    return implementation(__package__, code).ternary_int8_matmul(codes.contiguous(), packed.contiguous())  # type: ignore[no-any-return]


@_packed_matmul.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@_ternary_int8_matmul.register_fake
def _(codes: Tensor, packed: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], packed.shape[0]), dtype=torch.int32)
