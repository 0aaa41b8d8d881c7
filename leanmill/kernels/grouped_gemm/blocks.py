"""The grouped product as one torch product an expert, into memory that is there already.

For processors that multiply 16-bit floats themselves, where torch's product beats ours, for fp64,
and for machines without a C compiler. Elsewhere 16-bit operands are widened an expert at a time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from leanmill.kernels.grouped_gemm.problem import Gradients, Needed, Problem
from leanmill.kernels.moe_permute.op import order_of_positions


_NATIVE_FLAGS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products in a 16-bit dtype; true for wider ones."""
    if dtype not in _NATIVE_FLAGS:
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not _NATIVE_FLAGS[dtype].isdisjoint(flags)


def forward(problem: Problem) -> Tensor:
    """Return [N, out], or [T, out] with `scatter_index`."""
    walk = _Walk(problem)
    out = walk.target(problem.num_rows, problem.out_features, problem.scatter_index)
    for expert, start, end in walk.experts():
        product = torch.mm(walk.own_rows(start, end), walk.widen(problem.weight[expert]).t())
        walk.put(out, walk.scaled(product, start, end), walk.scatter_tokens, start, end)
    return out.to(problem.rows.dtype)


def backward(problem: Problem, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given that of `forward`'s result."""
    walk = _Walk(problem)
    grad_rows = walk.target(problem.num_rows, problem.in_features, problem.gather_index) if needed.rows else None
    grad_weight = torch.zeros_like(problem.weight) if needed.weight else None
    dots = problem.rows.new_zeros(problem.num_rows, dtype=walk.wide) if needed.scatter_weights else None
    for expert, start, end in walk.experts():
        upstream = walk.widen(_rows_of(grad, walk.scatter_tokens, start, end))
        if grad_rows is not None or dots is not None:
            product = torch.mm(upstream, walk.widen(problem.weight[expert]))
            if dots is not None:
                # <W x, g> = <x, W' g>: the product for the rows' gradient holds that of the weights.
                dots[start:end] = (product.to(walk.wide) * walk.own_rows(start, end).to(walk.wide)).sum(-1)
            if grad_rows is not None:
                walk.put(grad_rows, walk.scaled(product, start, end), walk.gather_tokens, start, end)
        if grad_weight is not None:
            scaled = walk.scaled(upstream, start, end).to(walk.compute)
            grad_weight[expert] = torch.mm(scaled.t(), walk.own_rows(start, end))
    grad_scatter_weights = None
    if dots is not None:
        assert problem.scatter_index is not None
        assert problem.scatter_weights is not None
        grad_scatter_weights = dots[problem.scatter_index].to(problem.scatter_weights.dtype)
    return Gradients(None if grad_rows is None else grad_rows.to(problem.rows.dtype), grad_weight, grad_scatter_weights)


def _rows_of(source: Tensor, index: Tensor | None, start: int, end: int) -> Tensor:
    return source[start:end] if index is None else source[index[start:end]]


class _Walk:
    """A problem expert by expert: its rows, where their results go, and the dtypes to compute in."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        dtype = problem.rows.dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.compute = dtype if multiplies_natively(dtype) else self.wide
        self.gather_tokens = self.scatter_tokens = self.scale = None
        if problem.gather_index is not None:
            self.gather_tokens = order_of_positions(problem.gather_index) // problem.gather_index.shape[1]
        if problem.scatter_index is not None:
            copies = order_of_positions(problem.scatter_index)
            self.scatter_tokens = copies // problem.scatter_index.shape[1]
            if problem.scatter_weights is not None:
                self.scale = problem.scatter_weights.reshape(-1)[copies].to(self.wide).unsqueeze(-1)

    def experts(self) -> list[tuple[int, int, int]]:
        """The experts that have rows, with their first row and the row after the last."""
        ends = self.problem.offsets.tolist()
        return [(e, s, t) for e, (s, t) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if s < t]

    def widen(self, tensor: Tensor) -> Tensor:
        """In the dtype that products are computed in."""
        return tensor.to(self.compute)

    def own_rows(self, start: int, end: int) -> Tensor:
        """The problem's rows `start` to `end` in sorted order."""
        return self.widen(_rows_of(self.problem.rows, self.gather_tokens, start, end))

    def scaled(self, rows: Tensor, start: int, end: int) -> Tensor:
        """Multiply by the factors of sorted rows `start` to `end`, if there are any."""
        return rows if self.scale is None else rows.to(self.wide) * self.scale[start:end]

    def target(self, num_rows: int, width: int, index: Tensor | None) -> Tensor:
        """Zeros for sorted rows, or in the wide dtype for sums over the K rows of each token."""
        if index is None:
            return self.problem.rows.new_zeros(num_rows, width)
        return self.problem.rows.new_zeros(index.shape[0], width, dtype=self.wide)

    def put(self, out: Tensor, product: Tensor, tokens: Tensor | None, start: int, end: int) -> None:
        """Store an expert's results, or add them to its tokens: experts come in order, so sums repeat."""
        if tokens is None:
            out[start:end] = product
            return
        out.index_add_(0, tokens[start:end], product.to(out.dtype))
