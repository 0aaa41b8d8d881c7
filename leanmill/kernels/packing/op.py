"""Public entries: `pack` and `unpack`."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose, implementation
from leanmill.kernels.packing import cpu, naive
from leanmill.kernels.packing.encoding import (
    TERNARY,
    Encoding,
    code_dtype,
    code_range,
    codes_per_byte,
    number_of,
    packed_length,
)
from leanmill.kernels.sharded import is_dtensor


_CODE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def pack(codes: Tensor, encoding: Encoding) -> Tensor:
    """Pack codes along the last dim; `unpack` gives them back exactly.

    Args:
        codes: Integers [..., n]: 0 to 2^b - 1 for b bits, -1 to 1 for ternary. Any strides.
        encoding: 1, 2, 4 or 8 bits a code, or "ternary": five base-3 digits a byte (1.6 bits).

    Returns:
        uint8 [..., ceil(n / codes per byte)]. Every row starts a byte of its own; a row's last byte
        is filled up with code 0. The first code of a byte lies in its lowest bits; the layout of
        ternary bytes is in `naive.pack`.

    Raises:
        ValueError: Codes out of range, of another dtype, without dims or sharded; an unknown encoding.
    """
    number = number_of(encoding)
    if is_dtensor(codes):
        raise ValueError(f"codes {tuple(codes.shape)} are a DTensor; pack the local rows: pack(codes.to_local(), ...)")
    if codes.dim() == 0 or codes.dtype not in _CODE_DTYPES:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; allowed: integers of at least one dim, [..., n]"
        )
    return torch.ops.leanmill.pack(codes, number)


def unpack(packed: Tensor, encoding: Encoding, num_codes: int) -> Tensor:
    """Return the codes that `pack` was given.

    Args:
        packed: uint8 [..., ceil(num_codes / codes per byte)].
        encoding: What `pack` was given.
        num_codes: Codes a row; `packed` does not tell how much of its last byte is filling.

    Returns:
        [..., num_codes], uint8, or int8 for ternary.

    Raises:
        ValueError: `packed` is not uint8, is sharded, or does not hold `num_codes` a row.
    """
    number = number_of(encoding)
    if is_dtensor(packed):
        raise ValueError(f"packed {tuple(packed.shape)} is a DTensor; unpack the local rows: packed.to_local()")
    if packed.dtype != torch.uint8 or packed.dim() == 0:
        raise ValueError(f"packed is {packed.dtype} {tuple(packed.shape)}; allowed: uint8 of at least one dim")
    if num_codes < 0 or packed.shape[-1] != packed_length(num_codes, number):
        raise ValueError(
            f"packed {tuple(packed.shape)} has {packed.shape[-1]} bytes a row, which hold "
            f"{packed.shape[-1] * codes_per_byte(number)} codes of {encoding!r}, not num_codes={num_codes} "
            f"({packed_length(max(num_codes, 0), number)} bytes)"
        )
    return torch.ops.leanmill.unpack(packed, number, num_codes)


@torch.library.custom_op("leanmill::pack", mutates_args=())
def _pack(codes: Tensor, number: int) -> Tensor:
    code = choose("pack", codes, c=cpu.library, triton=lambda: codes.numel() > 0)
    if code is Code.C and codes.element_size() == 1 and not _is_ambiguous(codes, number):
        packed = cpu.pack(codes, number)
        if packed is not None:
            return packed
    lowest, largest = code_range(number)
    if codes.numel() and not lowest <= int(codes.min()) <= int(codes.max()) <= largest:
        raise ValueError(
            f"codes {tuple(codes.shape)} run from {int(codes.min())} to {int(codes.max())}; an encoding of "
            f"{'base 3' if number == TERNARY else f'{number} bits'} takes {lowest} to {largest}"
        )
    if code is Code.TRITON:
        from leanmill.kernels.packing import kernel

        return kernel.pack(codes.to(torch.int8 if number == TERNARY else torch.uint8), number)
    return naive.pack(codes, number)


def _is_ambiguous(codes: Tensor, number: int) -> bool:
    """Whether C, which looks at bytes, would take codes out of range for others within it."""
    return (number == 8 and codes.dtype == torch.int8) or (number == TERNARY and codes.dtype == torch.uint8)


@_pack.register_fake
def _(codes: Tensor, number: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], packed_length(codes.shape[-1], number)), dtype=torch.uint8)


@torch.library.custom_op("leanmill::unpack", mutates_args=())
def _unpack(packed: Tensor, number: int, num_codes: int) -> Tensor:
    code = choose("unpack", packed, c=cpu.library, triton=lambda: packed.numel() > 0)
    return implementation(__package__, code).unpack(packed, number, num_codes)  # type: ignore[no-any-return]


@_unpack.register_fake
def _(packed: Tensor, number: int, num_codes: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], num_codes), dtype=code_dtype(number))
