"""The grouped product through torch's `grouped_mm`, rows copied to their order before and after.

torch's kernel for GPUs (bf16, rows of whole 16 bytes) uses the tensor cores better than ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.grouped_gemm.problem import Gradients, Needed, Problem
from leanmill.kernels.moe_permute.op import _combine, _dots, _spread


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
    upstream = spread_grad(problem, grad)
    grad_rows = grad_weight = grad_scatter_weights = None
    if needed.rows:
        product = _without_tail(problem, F.grouped_mm(upstream, problem.weight, offs=ends))
        grad_rows = product if problem.gather_index is None else _combine(product, problem.gather_index, None)
    if needed.weight:
        grad_weight = F.grouped_mm(upstream.t(), sorted_rows(problem), offs=ends)
    if needed.scatter_weights:
        assert problem.scatter_index is not None
        assert problem.scatter_weights is not None
        product = F.grouped_mm(sorted_rows(problem), problem.weight.transpose(-2, -1), offs=ends)
        dots = _dots(_without_tail(problem, product), problem.scatter_index, grad)
        grad_scatter_weights = dots.to(problem.scatter_weights.dtype)
    return Gradients(grad_rows, grad_weight, grad_scatter_weights)


def sorted_rows(problem: Problem) -> Tensor:
    """The rows in sorted order [N, in]."""
    return problem.rows if problem.gather_index is None else _spread(problem.rows, problem.gather_index, None)


def combine_rows(problem: Problem, product: Tensor) -> Tensor:
    """Sum the rows of the product to tokens where the problem says so."""
    if problem.scatter_index is None:
        return product
    return _combine(product, problem.scatter_index, problem.scatter_weights)


def spread_grad(problem: Problem, grad: Tensor) -> Tensor:
    """The gradient of each row of the product [N, out]."""
    if problem.scatter_index is None:
        return grad.contiguous()
    return _spread(grad, problem.scatter_index, problem.scatter_weights)


def _ends(problem: Problem) -> Tensor:
    return problem.offsets.to(torch.int32)


def _without_tail(problem: Problem, product: Tensor) -> Tensor:
    """Zeros in the rows of no expert, which torch's kernel leaves as they were."""
    row = torch.arange(product.shape[0], device=product.device)
    return product.masked_fill_((row >= problem.offsets[-1]).unsqueeze(-1), 0.0)
