"""One token times packed rows: what generation does for every weight, bound by the reading of its bytes.

The token is rounded to whole numbers of about 2^-22 of its largest magnitude (2^-21 for ternary codes), about what
sums in fp32 lose anyhow; sums of whole numbers are exact, so the result is the same on any number of threads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import pointer
from leanmill.kernels.packing.encoding import TERNARY, codes_per_byte


_DONE, _NO_MEMORY = 0, 1


def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("one_token.c"))


def covers(number: int, num_codes: int, num_groups: int) -> bool:
    """Whether this processor multiplies bytes, and groups are whole bytes."""
    functions = library()
    if functions is None or not functions.knows_encoding(ctypes.c_int(number)):
        return False
    return num_groups == 1 or num_codes // num_groups % codes_per_byte(number) == 0


class RowsInC:
    """A packed weight whose addresses C has; keep it while the tensors live where they are.

    Args:
        packed: uint8 [out, bytes], contiguous.
        scales: fp32 [out, groups], contiguous.
        zeros: Like `scales`, as codes count: ternary ones from 0.
        num_codes: in.
        number: The encoding's; `covers` it.
    """

    def __init__(self, packed: Tensor, scales: Tensor, zeros: Tensor, num_codes: int, number: int) -> None:
        functions = library()
        assert functions is not None
        self._call = functions.dot_one_token
        self._tensors = (packed, scales, zeros)
        self.num_rows, num_bytes = packed.shape
        self.num_codes = num_codes
        self._weight = tuple(pointer(tensor) for tensor in self._tensors)
        sizes = (self.num_rows, num_bytes, num_codes, scales.shape[-1])
        self._sizes = (*(ctypes.c_int64(size) for size in sizes), ctypes.c_int(number))
        self._num_bytes = num_bytes

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return W x [out] in fp32 for fp32 [in], contiguous; None where x is not finite or next to 0."""
        out = x.new_empty(self.num_rows)
        return out if self._run(pointer(x), None, pointer(out), None) else None

    def count(self, tokens: Tensor) -> Tensor:
        """Return the whole sums [out] of ternary codes times int8 [in], contiguous."""
        counts = tokens.new_empty(self.num_rows, dtype=torch.int32)
        self._run(None, pointer(tokens), None, pointer(counts))
        return counts

    def _run(self, *arguments: ctypes.c_void_p | None) -> bool:
        num_threads = ctypes.c_int(threads.num_threads_for(self.num_rows, self._num_bytes))
        status = self._call(*self._weight, *arguments, *self._sizes, threads.team_for_c(), num_threads)
        if status == _NO_MEMORY:
            raise MemoryError(f"no memory for a token of {self.num_codes} numbers")
        return status == _DONE  # type: ignore[no-any-return]


def packed_matmul(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor | None:
    """Return x @ W^T [1, out] in fp32 for x [1, in], all contiguous and but for `packed` fp32; None as `multiply`."""
    zeros = zero_points + 1 if number == TERNARY else zero_points
    out = RowsInC(packed, scales, zeros, x.shape[-1], number).multiply(x)
    return None if out is None else out.unsqueeze(0)


def ternary_int8_matmul(codes: Tensor, packed: Tensor) -> Tensor:
    """Return the exact int32 products [1, out] of int8 [1, in] and ternary rows."""
    ones = torch.ones((packed.shape[0], 1))
    return RowsInC(packed, ones, ones, codes.shape[-1], TERNARY).count(codes).unsqueeze(0)
