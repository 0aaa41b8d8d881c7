"""Zeros in the rows of no expert, where they are: their number is known to the GPU only.

A mask over the whole product would read and write all of it, 0.3 of the product's own time in the shapes of a model.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


_NUM_PROGRAMS = 256
"""Enough to keep any GPU's memory busy, few enough to cost nothing where no row is left over."""


@triton.jit
def _zero_kernel(out, ends, num_rows, num_experts, width, NUM_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.load(ends + num_experts - 1)
    for row in range(first + tl.program_id(0), num_rows, NUM_PROGRAMS):
        at = out + row * width  # int64, as ends are
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(at + column, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < width)


def zero_tail(product: Tensor, ends: Tensor) -> None:
    """Write zeros into the rows [ends[-1], N) of `product` [N, width], contiguous; nothing waits for the GPU."""
    num_rows, width = product.shape
    if product.numel():
        block = min(triton.next_power_of_2(width), 1024)
        _zero_kernel[(_NUM_PROGRAMS,)](
            product, ends, num_rows, ends.numel(), width, NUM_PROGRAMS=_NUM_PROGRAMS, BLOCK=block, num_warps=4
        )
