"""The gate in Triton: one read of each operand, one write of each result."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _swiglu_kernel(gate_up, grad, out, width, IS_BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = 2 * row * width + column
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    kind = out.dtype.element_ty
    if IS_BACKWARD:
        upstream = tl.load(grad + row * width + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, (upstream * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))).to(kind), mask=mask)
        tl.store(out + at + width, (upstream * (gate * sigmoid)).to(kind), mask=mask)
    else:
        tl.store(out + row * width + column, (gate * sigmoid * up).to(kind), mask=mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `naive.swiglu` of rows [N, 2I]."""
    return _launch(gate_up, gate_up, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), is_backward=False)


def backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return `naive.backward` for rows [N, 2I]."""
    return _launch(gate_up, grad, torch.empty_like(gate_up), is_backward=True)


def _launch(gate_up: Tensor, grad: Tensor, out: Tensor, *, is_backward: bool) -> Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out.numel():
        block = min(triton.next_power_of_2(width), 1024)
        grid = (num_rows, triton.cdiv(width, block))
        _swiglu_kernel[grid](gate_up, grad, out, width, IS_BACKWARD=is_backward, BLOCK=block, num_warps=4)
    return out
