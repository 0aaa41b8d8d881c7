"""The grouped product as one torch product an expert, into memory that is there already.

For processors that multiply 16-bit floats themselves, where torch's product beats ours, for fp64,
and for machines without a C compiler. Elsewhere 16-bit operands are widened an expert at a time.
Rows are gathered, scaled and summed to tokens for several experts at once: beside products on a
matrix unit that is half of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from leanmill.kernels.grouped_gemm import rows
from leanmill.kernels.grouped_gemm.problem import Gradients, Needed, Problem
from leanmill.kernels.moe_permute.op import order_of_positions
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.native.processor import multiplies_natively


_PIECE_ROWS = 4096
"""Rows that are gathered at once, unless one expert has more: a few calls, and no copy of every token's K."""


def forward(problem: Problem) -> Tensor:
    """Return [N, out], or [T, out] with `scatter_index`."""
    walk = _Walk(problem)
    out = walk.target(problem.num_rows, problem.out_features, problem.scatter_index)
    for piece in walk.pieces():
        product = walk.product_into(out, problem.scatter_index, piece, problem.out_features)
        walk.multiply(product, walk.own_rows(piece), piece, to_input=False)
        walk.put(out, product, walk.scatter_tokens, piece)
    return out.to(problem.rows.dtype)


def backward(problem: Problem, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given that of `forward`'s result."""
    walk = _Walk(problem)
    grad_rows = walk.target(problem.num_rows, problem.in_features, problem.gather_index)
    grad_weight = walk.weight_target() if needed.weight else None
    dots = problem.rows.new_zeros(problem.num_rows, dtype=walk.wide) if needed.scatter_weights else None
    for piece in walk.pieces():
        upstream = walk.rows_of(grad, walk.scatter_tokens, piece)
        own = walk.own_rows(piece) if needed.weight or dots is not None else None
        if needed.rows or dots is not None:
            product = walk.product_into(grad_rows, problem.gather_index, piece, problem.in_features)
            walk.multiply(product, upstream, piece, to_input=True)
            if dots is not None:
                assert own is not None
                # <W x, g> = <x, W' g>: the product for the rows' gradient holds that of the weights.
                dots[piece.start : piece.end] = rows.dots(product, own)
            if needed.rows:
                walk.put(grad_rows, product, walk.gather_tokens, piece)
        if grad_weight is not None:
            assert own is not None
            walk.outer(grad_weight, upstream, own, piece)
    grad_scatter_weights = None
    if dots is not None:
        assert problem.scatter_weights is not None
        grad_scatter_weights = problem.by_copy(dots).to(problem.scatter_weights.dtype)
    return Gradients(grad_rows.to(problem.rows.dtype) if needed.rows else None, grad_weight, grad_scatter_weights)


@dataclass(frozen=True)
class _Piece:
    """Sorted rows of neighbouring experts."""

    start: int
    end: int
    experts: list[tuple[int, int, int]]
    """Experts that have rows, with their first row and the row after the last, counted from `start`."""


class _Walk:
    """A problem piece by piece: its rows, where their results go, and the dtypes to compute in."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.ends: list[int] = problem.offsets.tolist()
        dtype = problem.rows.dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.compute = dtype if multiplies_natively(dtype) else self.wide
        self.gather_tokens = self.scatter_tokens = self.scale = None
        if problem.gather_index is not None:
            copies = order_of_positions(problem.gather_index)[: problem.num_rows]
            self.gather_tokens = copies // problem.gather_index.shape[1]
        if problem.scatter_index is not None:
            copies = order_of_positions(problem.scatter_index)[: problem.num_rows]
            self.scatter_tokens = copies // problem.scatter_index.shape[1]
            if problem.scatter_weights is not None:
                self.scale = problem.scatter_weights.reshape(-1)[copies].to(self.wide)

    def pieces(self) -> Iterator[_Piece]:
        """All experts that have rows, in order."""
        start = 0
        experts: list[tuple[int, int, int]] = []
        for expert, (first, last) in enumerate(zip([0, *self.ends[:-1]], self.ends, strict=True)):
            if experts and last - start > _PIECE_ROWS:
                yield _Piece(start, first, experts)
                start, experts = first, []
            if first < last:
                experts.append((expert, first - start, last - start))
        if experts:
            yield _Piece(start, self.ends[-1], experts)

    def rows_of(self, source: Tensor, index: Tensor | None, piece: _Piece) -> Tensor:
        """Sorted rows of a piece in the dtype that products are computed in."""
        span = slice(piece.start, piece.end)
        found = source[span] if index is None else source.index_select(0, index[span])
        return found.to(self.compute)

    def own_rows(self, piece: _Piece) -> Tensor:
        """The problem's rows of a piece."""
        return self.rows_of(self.problem.rows, self.gather_tokens, piece)

    def target(self, num_rows: int, width: int, index: Tensor | None) -> Tensor:
        """Memory for sorted rows, zero where nobody writes; with `index` wide zeros for sums over K rows."""
        if index is not None:
            return large_empty(self.problem.rows, index.shape[0], width, dtype=self.wide).zero_()
        out = large_empty(self.problem.rows, num_rows, width)
        out[self.ends[-1] :].zero_()
        return out

    def weight_target(self) -> Tensor:
        """Memory for the gradient of all weights, zero for experts without rows."""
        out = large_empty(self.problem.weight, *self.problem.weight.shape)
        for expert, (first, last) in enumerate(zip([0, *self.ends[:-1]], self.ends, strict=True)):
            if first == last:
                out[expert].zero_()
        return out

    def product_into(self, out: Tensor, index: Tensor | None, piece: _Piece, width: int) -> Tensor:
        """Where to compute a piece's product [rows, width]: in its place in `out` if it is as it goes there."""
        if index is None and out.dtype == self.compute:
            return out[piece.start : piece.end]
        return out.new_empty(piece.end - piece.start, width, dtype=self.compute)

    def multiply(self, out: Tensor, left: Tensor, piece: _Piece, *, to_input: bool) -> None:
        """Multiply each expert's rows with its weight, or with the transpose for the gradient of the input."""
        for expert, first, last in piece.experts:
            weight = self.problem.weight[expert].to(self.compute)
            torch.mm(left[first:last], weight if to_input else weight.t(), out=out[first:last])

    def outer(self, grad_weight: Tensor, upstream: Tensor, own: Tensor, piece: _Piece) -> None:
        """Write the gradients of the piece's experts' weights."""
        if self.scale is not None:
            scale = self.scale[piece.start : piece.end]
            # Either factor can carry the scale; the narrower is less to write.
            if own.shape[1] < upstream.shape[1]:
                own = rows.scaled(own, scale)
            else:
                upstream = rows.scaled(upstream, scale)
        for expert, first, last in piece.experts:
            left, right = upstream[first:last].t(), own[first:last]
            if grad_weight.dtype == self.compute:
                torch.mm(left, right, out=grad_weight[expert])
            else:
                grad_weight[expert] = torch.mm(left, right)

    def put(self, out: Tensor, product: Tensor, tokens: Tensor | None, piece: _Piece) -> None:
        """Store a piece's results, or add them to their tokens, times their factors; overwrites `product`."""
        span = slice(piece.start, piece.end)
        scale = None if self.scale is None else self.scale[span]
        if tokens is not None:
            rows.add_to_tokens(out, product, tokens[span], scale)
            return
        if scale is not None:
            rows.scaled(product, scale, in_place=True)
        if product.data_ptr() != out[span].data_ptr():
            out[span] = product
