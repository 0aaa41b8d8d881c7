"""The grouped product through torch's `grouped_mm`, rows copied to their order before and after.

torch's kernel for GPUs (bf16, rows of whole 16 bytes) uses the tensor cores better than ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.dispatch import on_gpu
from leanmill.kernels.grouped_gemm.problem import Gradients, Needed, Problem
from leanmill.kernels.moe_permute.op import _combine, _spread, order_of_positions


def is_supported(problem: Problem) -> bool:
    """Whether torch's kernel takes these operands."""
    size = problem.weight.element_size()
    aligned = all(width * size % 16 == 0 for width in problem.weight.shape[1:])
    return problem.weight.dtype == torch.bfloat16 and aligned and problem.num_rows > 0


def forward(problem: Problem) -> Tensor:
    """Return [N, out], or [T, out] with `scatter_index`."""
    product = F.grouped_mm(sorted_rows(problem), problem.weight.transpose(-2, -1), offs=_ends(problem))
    return combine_rows(problem, _without_tail(problem, product))


def backward(problem: Problem, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given that of `forward`'s result."""
    ends = _ends(problem)
    return backward_by(
        problem,
        grad,
        needed,
        to_input=lambda upstream: _without_tail(problem, F.grouped_mm(upstream, problem.weight, offs=ends)),
        outer=lambda upstream: F.grouped_mm(upstream.t(), sorted_rows(problem), offs=ends),
    )


def backward_by(
    problem: Problem,
    grad: Tensor,
    needed: Needed,
    *,
    to_input: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
) -> Gradients:
    """Gradients from two products of sorted rows: with the weights, and with the problem's own rows.

    Args:
        problem: The operands.
        grad: Gradient of the result.
        needed: What to return.
        to_input: Multiplies [N, out] with each row's weight: [N, in].
        outer: Sums the outer products of [N, out] with the problem's rows by expert: [E, out, in].
    """
    grad_rows = grad_weight = grad_scatter_weights = None
    if needed.rows or needed.scatter_weights:
        index, weights = problem.scatter_index, problem.scatter_weights
        grad_rows = to_input(grad.contiguous() if index is None else _spread(grad, index, None, problem.num_rows))
        if needed.scatter_weights:
            assert index is not None
            assert weights is not None
            # <W x, g> = <x, W' g>: the product for the rows' gradient holds that of the weights.
            by_row = (grad_rows.float() * sorted_rows(problem).float()).sum(-1)
            grad_scatter_weights = problem.by_copy(by_row).to(weights.dtype)
        if index is not None and weights is not None:
            factors = weights.reshape(-1)[order_of_positions(index)[: problem.num_rows]].float()
            grad_rows = (grad_rows * factors.unsqueeze(-1)).to(grad.dtype)
        if problem.gather_index is not None and needed.rows:
            grad_rows = _combine(grad_rows, problem.gather_index, None)
    if needed.weight:
        grad_weight = outer(spread_grad(problem, grad))
    return Gradients(grad_rows if needed.rows else None, grad_weight, grad_scatter_weights)


def sorted_rows(problem: Problem) -> Tensor:
    """The rows in sorted order [N, in]."""
    if problem.gather_index is None:
        return problem.rows
    return _spread(problem.rows, problem.gather_index, None, problem.num_rows)


def combine_rows(problem: Problem, product: Tensor) -> Tensor:
    """Sum the rows of the product to tokens where the problem says so."""
    if problem.scatter_index is None:
        return product
    return _combine(product, problem.scatter_index, problem.scatter_weights)


def spread_grad(problem: Problem, grad: Tensor) -> Tensor:
    """The gradient of each row of the product [N, out]."""
    if problem.scatter_index is None:
        return grad.contiguous()
    return _spread(grad, problem.scatter_index, problem.scatter_weights, problem.num_rows)


def _ends(problem: Problem) -> Tensor:
    return problem.offsets.to(torch.int32)


def _without_tail(problem: Problem, product: Tensor) -> Tensor:
    """Zeros in the rows of no expert, which torch's kernel leaves as they were."""
    if on_gpu(product):
        from leanmill.kernels.grouped_gemm.tail import zero_tail

        zero_tail(product, problem.offsets)
        return product
    row = torch.arange(product.shape[0], device=product.device)
    return product.masked_fill_((row >= problem.offsets[-1]).unsqueeze(-1), 0.0)
