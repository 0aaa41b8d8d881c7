"""The grouped product on the CPU in C: gather, widening and scaling while packing, scatter while storing.

Tensor code would copy every gathered row, keep every token's copies of the result for the combine
and, for 16-bit types on processors that cannot multiply them, convert slowly. Here rows go from
where they lie into the packed blocks that a matrix product needs anyway.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.grouped_gemm.problem import Gradients, Needed, Problem
from leanmill.kernels.moe_permute.op import order_of_positions
from leanmill.kernels.native import compiler, dtypes, threads
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.native.processor import has_matrix_unit, multiplies_natively


_MAX_CHUNK = 512
"""Columns a task computes, so that a block of results stays in a core's cache."""
_MAX_PACKED_FLOATS = 1 << 20
"""Weights a task packs at once."""
_MAX_ROWS = 1024
"""Rows a task computes with the weights it has packed."""
_MAX_OUTER_ROWS = 192
"""Rows of a weight's gradient a task computes: MAX_OUTER_ROWS in cpu.c."""
_LANES = 32
"""Chunks are multiples of this, so that register tiles of every instruction set fill them."""

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class RowsProblem(ctypes.Structure):
    """`struct rows_problem` of cpu.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("rows", "weight", "out", "sums", "row_index", "token_index", "scale")),
        *((name, _POINTER) for name in ("dot_with", "dot_index", "dots", "ends", "tasks", "gate_up", "hidden")),
        *((name, _INT) for name in ("num_tasks", "num_experts", "k", "n", "chunk", "num_chunks", "weight_is_k_by_n")),
        ("gate", _INT),
    ]


class _OuterProblem(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("left", "right", "out", "left_index", "right_index", "scale")),
        *((name, _POINTER) for name in ("ends", "tasks")),
        *((name, _INT) for name in ("num_tasks", "m", "n", "chunk")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def is_best_for(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are computed here, rather than by torch expert by expert.

    They are in fp32, where this processor cannot multiply the dtype itself, and in bf16 where it can do so
    in vectors. Matrix units (AMX) are torch's.
    """
    functions = library()
    if functions is None or dtype not in dtypes.SUFFIXES:
        return False
    if dtype == torch.float32 or not multiplies_natively(dtype):
        return True
    return dtype == torch.bfloat16 and bool(functions.multiplies_pairs()) and not has_matrix_unit(dtype)


def forward(problem: Problem) -> Tensor:
    """Return [N, out], or [T, out] with `scatter_index`; sums are fp32 and rounded once."""
    order = Orders(problem)
    out, _ = _rows_product(
        problem,
        problem.rows,
        row_index=order.gather_tokens,
        token_index=order.scatter_tokens,
        scale=order.scale,
        num_tokens=0 if problem.scatter_index is None else problem.scatter_index.shape[0],
        to_input=False,
    )
    return out


def backward(problem: Problem, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given that of `forward`'s result."""
    order = Orders(problem)
    grad = grad.contiguous()
    grad_rows = grad_weight = grad_scatter_weights = None
    if needed.rows or needed.scatter_weights:
        grad_rows, dots = _rows_product(
            problem,
            grad,
            row_index=order.scatter_tokens,
            token_index=order.gather_tokens,
            scale=order.scale,
            num_tokens=problem.rows.shape[0],
            to_input=True,
            with_dots=needed.scatter_weights,
            dot_index=order.gather_tokens,
        )
        if dots is not None:
            assert problem.scatter_weights is not None
            # <W x, g> = <x, W' g>: the product for the rows' gradient holds that of the weights.
            grad_scatter_weights = problem.by_copy(dots.sum(-1)).to(problem.scatter_weights.dtype)
    if needed.weight:
        grad_weight = _outer_product(problem, grad, order)
    return Gradients(grad_rows if needed.rows else None, grad_weight, grad_scatter_weights)


class Orders:
    """The [T, K] indices of a problem turned around: for each sorted row its token and its factor."""

    def __init__(self, problem: Problem) -> None:
        self.gather_tokens = self.scatter_tokens = self.scale = None
        if problem.gather_index is not None:
            copies = order_of_positions(problem.gather_index)[: problem.num_rows]
            self.gather_tokens = copies // problem.gather_index.shape[1]
        if problem.scatter_index is not None:
            copies = order_of_positions(problem.scatter_index)[: problem.num_rows]
            self.scatter_tokens = copies // problem.scatter_index.shape[1]
            if problem.scatter_weights is not None:
                self.scale = problem.scatter_weights.reshape(-1)[copies].float()


def _rows_product(
    problem: Problem,
    rows: Tensor,
    *,
    row_index: Tensor | None,
    token_index: Tensor | None,
    scale: Tensor | None,
    num_tokens: int,
    to_input: bool,
    with_dots: bool = False,
    dot_index: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply rows with their expert's weight, or with its transpose for the gradient of the input.

    Returns:
        The product, scaled and summed to tokens as asked, and with `with_dots` the inner product of
        each unscaled row with the problem's own row, [N, chunks] to be summed.
    """
    _, num_out, num_in = problem.weight.shape
    k, n = (num_out, num_in) if to_input else (num_in, num_out)
    ends: list[int] = problem.offsets.tolist()
    is_summed = token_index is not None
    chunk = chunk_width(n, k, torch.get_num_threads() if is_summed else 1)
    num_chunks = -(-n // chunk)
    # Rows past the last expert's belong to nobody, and no task writes their products.
    dots = torch.zeros(problem.num_rows, num_chunks) if with_dots else None
    sums = out = None
    if is_summed:
        sums = large_empty(rows, num_tokens, n, dtype=torch.float32).zero_()
        tasks = [(-1, 0, 0, column) for column in range(0, n, chunk)]
    else:
        out = large_empty(rows, problem.num_rows, n)
        out[ends[-1] :].zero_()
        tasks = row_tasks(ends, n, chunk)
    table = torch.tensor(tasks, dtype=torch.int64).view(-1, 4)
    arguments = RowsProblem(
        *map(address, (rows, problem.weight, out, sums, row_index, token_index, scale)),
        *map(address, (problem.rows if dots is not None else None, dot_index, dots, problem.offsets, table)),
        *(None, None, len(tasks), len(ends), k, n, chunk, num_chunks, int(to_input), 0),
    )
    run("grouped_rows", rows.dtype, arguments, len(tasks), ends[-1] * k * n)
    result = sums if out is None else out
    assert result is not None
    return result.to(rows.dtype), dots


def _outer_product(problem: Problem, grad: Tensor, order: Orders) -> Tensor:
    num_experts, m, n = problem.weight.shape
    out = large_empty(problem.weight, *problem.weight.shape)
    ends: list[int] = problem.offsets.tolist()
    chunk = chunk_width(n)
    rows_of = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    tasks = [
        (expert, first, min(first + _MAX_OUTER_ROWS, m), column)
        # Long tasks first, so that threads finish together.
        for expert in sorted(range(num_experts), key=lambda e: -rows_of[e])
        for first in range(0, m, _MAX_OUTER_ROWS)
        for column in range(0, n, chunk)
    ]
    table = torch.tensor(tasks, dtype=torch.int64).view(-1, 4)
    arguments = _OuterProblem(
        *map(address, (grad, problem.rows, out, order.scatter_tokens, order.gather_tokens, order.scale)),
        *map(address, (problem.offsets, table)),
        *(len(tasks), m, n, chunk),
    )
    run("grouped_outer", grad.dtype, arguments, len(tasks), ends[-1] * m * n)
    return out


def row_tasks(ends: list[int], n: int, chunk: int) -> list[tuple[int, int, int, int]]:
    """Return (expert, first row, row after the last, first column) of each task of a product of sorted rows."""
    tasks = []
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            continue
        num_pieces = -(-(end - start) // _MAX_ROWS)
        bounds = [start + (end - start) * piece // num_pieces for piece in range(num_pieces + 1)]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            tasks += [(expert, first, last, column) for column in range(0, n, chunk)]
    # Long tasks first, so that threads finish together.
    return sorted(tasks, key=lambda task: task[1] - task[2])


def chunk_width(num_columns: int, depth: int = 0, num_threads: int = 1) -> int:
    """Columns a task, so that `num_threads` tasks at least come of `num_columns`.

    Args:
        num_columns: Columns of the product.
        depth: Terms of each sum that a task packs at once.
        num_threads: Tasks wanted.
    """
    share = -(-num_columns // num_threads)
    most = min(_MAX_CHUNK, max(_MAX_PACKED_FLOATS // max(depth, 1), 4 * _LANES))
    return min(most // _LANES, -(-share // _LANES)) * _LANES


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor lies, for a C structure."""
    return None if tensor is None else tensor.data_ptr()


def run(name: str, dtype: torch.dtype, arguments: ctypes.Structure, num_tasks: int, num_products: int) -> None:
    """Let as many threads as `num_products` multiplications are worth take tasks until none is left."""
    functions = library()
    assert functions is not None
    function = functions[f"{name}_{dtypes.SUFFIXES[dtype]}"]
    function.restype = ctypes.c_int
    taken, failures = ctypes.c_int64(0), []

    def work(first: int, last: int) -> None:
        if function(ctypes.byref(arguments), ctypes.byref(taken)):
            failures.append(first)

    # Each thread takes tasks from the common counter until none is left.
    num_workers = min(torch.get_num_threads(), num_tasks)
    if num_workers:
        threads.parallel_for(work, num_workers, max(1, num_products // 64 // num_workers))
    if failures:
        raise MemoryError(f"no memory for the packed blocks of {name} ({num_workers} threads)")
