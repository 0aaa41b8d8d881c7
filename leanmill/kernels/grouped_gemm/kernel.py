"""The grouped product in Triton: tiles find their expert on the device, sums have one order.

The number of rows of each expert is known to the GPU only. So many programs are started as the
tiles of any distribution can need (one partly filled tile an expert more than the rows need), and
each finds its tile from the experts' end rows; programs left over return at once. Products are
accumulated in fp32 along one loop, without atomics, so results repeat bitwise.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.grouped_gemm import library
from leanmill.kernels.grouped_gemm.problem import Gradients, Needed, Problem
from leanmill.kernels.moe_permute import naive


@triton.jit
def _rows_kernel(
    rows,
    row_index,
    weight,
    out,
    ends,
    num_rows,
    num_experts,
    k,
    n,
    stride_k,
    stride_n,
    HAS_INDEX: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[r] = rows[index[r]] @ weight[expert of r], one tile [BM, BN] of one expert a program."""
    num_column_tiles = tl.cdiv(n, BN)
    tile = tl.program_id(0) // num_column_tiles
    column = tl.program_id(0) % num_column_tiles * BN + tl.arange(0, BN)
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(ends + experts - 1, mask=(experts > 0) & (experts <= num_experts), other=0)
    # One group more than there are experts: the rows of nobody, which get zeros.
    stops = tl.load(ends + experts, mask=experts < num_experts, other=0)
    stops = tl.where(experts == num_experts, num_rows, stops)
    tiles = tl.where(experts <= num_experts, (stops - starts + BM - 1) // BM, 0)
    tiles_until = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((tiles_until <= tile) & (experts <= num_experts)).to(tl.int32), axis=0)
    if expert > num_experts:
        return
    is_mine = experts == expert
    first_tile = tl.sum(tl.where(is_mine, tiles_until - tiles, 0), axis=0)
    row = tl.sum(tl.where(is_mine, starts, 0), axis=0) + (tile - first_tile) * BM + tl.arange(0, BM)
    row_mask = row < tl.sum(tl.where(is_mine, stops, 0), axis=0)
    source = row
    if HAS_INDEX:
        source = tl.load(row_index + row, mask=row_mask, other=0)
    depth = tl.where(expert == num_experts, 0, k)
    lane = tl.arange(0, BK)
    a_at = rows + source.to(tl.int64)[:, None] * k + lane[None, :]
    b_at = weight + expert.to(tl.int64) * k * n + lane[:, None] * stride_k + column[None, :] * stride_n
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        inside = start + lane < k
        a = tl.load(a_at + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at + start * stride_k, mask=inside[:, None] & (column < n)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out_at = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=row_mask[:, None] & (column < n)[None, :])


@triton.jit
def _outer_kernel(
    left,
    right,
    right_index,
    out,
    ends,
    m,
    n,
    HAS_INDEX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e] = sum over the expert's rows r, in order, of left[r]' right[index[r]]."""
    expert = tl.program_id(1)
    num_column_tiles = tl.cdiv(n, BN)
    rows_of_out = tl.program_id(0) // num_column_tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % num_column_tiles * BN + tl.arange(0, BN)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    lane = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        row = (start + lane).to(tl.int64)
        inside = row < last
        source = row
        if HAS_INDEX:
            source = tl.load(right_index + row, mask=inside, other=0)
        a_at = left + row[None, :] * m + rows_of_out[:, None]
        a = tl.load(a_at, mask=inside[None, :] & (rows_of_out < m)[:, None], other=0.0)
        b_at = right + source[:, None] * n + columns[None, :]
        b = tl.load(b_at, mask=inside[:, None] & (columns < n)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out_at = out + (expert.to(tl.int64) * m + rows_of_out)[:, None] * n + columns[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(rows_of_out < m)[:, None] & (columns < n)[None, :])


def forward(problem: Problem) -> Tensor:
    """Return [N, out], or [T, out] with `scatter_index`."""
    return library.combine_rows(problem, _rows_product(problem, problem.rows, _gather_tokens(problem), to_input=False))


def backward(problem: Problem, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given that of `forward`'s result."""
    return library.backward_by(
        problem,
        grad,
        needed,
        to_input=lambda upstream: _rows_product(problem, upstream, None, to_input=True),
        outer=lambda upstream: _outer_product(problem, upstream),
    )


def _gather_tokens(problem: Problem) -> Tensor | None:
    if problem.gather_index is None:
        return None
    return naive.invert(problem.gather_index)[: problem.num_rows] // problem.gather_index.shape[1]


def _rows_product(problem: Problem, rows: Tensor, row_index: Tensor | None, *, to_input: bool) -> Tensor:
    num_experts, num_out, num_in = problem.weight.shape
    k, n = (num_out, num_in) if to_input else (num_in, num_out)
    out = rows.new_empty(problem.num_rows, n)
    blocks = _blocks(rows, k, n, -(-problem.num_rows // num_experts))
    # The rows of nobody are a group of their own.
    num_tiles = triton.cdiv(problem.num_rows, blocks["BM"]) + num_experts + 1
    if out.numel():
        _rows_kernel[(num_tiles * triton.cdiv(n, blocks["BN"]),)](
            *(rows, rows if row_index is None else row_index, problem.weight, out, problem.offsets),
            *(problem.num_rows, num_experts, k, n, *((n, 1) if to_input else (1, k))),
            HAS_INDEX=row_index is not None,
            EXPERTS=triton.next_power_of_2(num_experts + 1),
            num_warps=8 if blocks["BM"] * blocks["BN"] >= 128 * 128 else 4,
            **blocks,
            **_arithmetic(rows),
        )
    return out


def _outer_product(problem: Problem, upstream: Tensor) -> Tensor:
    num_experts, m, n = problem.weight.shape
    out = torch.empty_like(problem.weight)
    row_index = _gather_tokens(problem)
    blocks = _blocks(upstream, -(-problem.num_rows // num_experts), n, m)
    num_tiles = triton.cdiv(m, blocks["BM"]) * triton.cdiv(n, blocks["BN"])
    if out.numel():
        _outer_kernel[(num_tiles, num_experts)](
            *(upstream, problem.rows, problem.rows if row_index is None else row_index, out, problem.offsets, m, n),
            HAS_INDEX=row_index is not None,
            num_warps=8 if blocks["BM"] * blocks["BN"] >= 128 * 128 else 4,
            **blocks,
            **_arithmetic(upstream),
        )
    return out


def _blocks(rows: Tensor, k: int, n: int, m: int) -> dict[str, int]:
    """Tile sizes: large enough for the tensor cores, no larger than the operands."""
    most = {"BM": 128, "BN": 128, "BK": 64} if rows.element_size() == 2 else {"BM": 64, "BN": 64, "BK": 32}
    sizes = {"BM": m, "BN": n, "BK": k}
    return {name: min(most[name], max(16, triton.next_power_of_2(max(size, 1)))) for name, size in sizes.items()}


def _arithmetic(rows: Tensor) -> dict[str, object]:
    # Off the GPU this runs in Triton's interpreter, which cannot multiply bf16.
    is_tf32 = rows.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return {"UPCAST": rows.device.type != "cuda", "PRECISION": "tf32" if is_tf32 else "ieee"}
