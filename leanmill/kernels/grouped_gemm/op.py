"""One entry for the grouped product, differentiable, on every device."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, fastest, implementation, log_path
from leanmill.kernels.grouped_gemm import blocks, cpu, library
from leanmill.kernels.grouped_gemm.checks import check_offsets, checked
from leanmill.kernels.grouped_gemm.problem import Needed, Problem
from leanmill.kernels.sharded import TokenLayout, is_dtensor


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    gather_index: Tensor | None = None,
    scatter_index: Tensor | None = None,
    scatter_weights: Tensor | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """Multiply rows sorted by expert with their expert's weight: `y[i] = weight[expert of i] @ rows[i]`.

    Sums are fp32 (fp64 for fp64). Results and gradients repeat bitwise: every sum has a fixed
    order. Only the operands are kept for backward.

    Args:
        rows: [N, in]; with `gather_index` tokens [T, in]. fp32, bf16, fp16 or fp64. Without an index
            it may be a DTensor of whole rows; the weight is then a Replicate one, and `offsets` still
            count the rows of all ranks.
        weight: [E, out, in], same dtype and device.
        offsets: End row of each expert [E] int32 or int64, ascending, at most N. Experts may have no
            rows; rows from the last offset on belong to no expert, and their products are zero.
        gather_index: [T, K] int64, the `positions` of `moe_permute`: sorted row `gather_index[t, k]`
            reads token t, so that the K copies of a token are never stored. N = T x K.
        scatter_index: [T, K] int64, likewise: the result is [T, out], the sum over a token's K rows.
        scatter_weights: [T, K], factors of that sum, differentiable: combine weights of a router.
        num_rows: N, where not all T x K copies have an expert and the caller knows how many do: entries of
            an index from N on belong to no expert, and nothing is stored for them. None makes N = T x K.

    Returns:
        [N, out], or [T, out] with `scatter_index`.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, factors without an index, a DTensor
            beside an index, and on the CPU, where it costs nothing, offsets or indices that point outside.

    Which code runs: see `docs/kernels/experts.md`. Gathering on load and scattering on store follow
    ScatterMoE (Tan et al., 2024); we take the gradient of the combine weights from the product that
    the rows' gradient needs anyway, <W x, g> = <x, W' g>, instead of keeping W x.
    """
    if is_dtensor(rows) and num_rows is None and gather_index is None and scatter_index is None:
        return _on_own_rows(rows, weight, offsets)
    offsets = checked(rows, weight, offsets, gather_index, scatter_index, scatter_weights, num_rows)
    arguments = (rows, weight, offsets, gather_index, scatter_index, scatter_weights, num_rows)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _product(*arguments)
    if not any(t.requires_grad for t in (rows, weight, scatter_weights) if t is not None):
        return _product(*arguments)
    collector = _Operands.apply(*arguments)
    return _Compute.apply(collector, *(t.detach() if isinstance(t, Tensor) else t for t in arguments))  # type: ignore[no-any-return]


def _on_own_rows(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the sorted rows [N, in] that each rank of a DTensor holds; the weight's gradient is summed."""
    layout = TokenLayout.of("rows", rows)
    own = torch.searchsorted(layout.positions(), layout.whole("offsets", offsets))
    product = grouped_gemm(layout.local("rows", rows), layout.whole("weight", weight), own)
    return layout.spread(product)


def path(problem: Problem) -> ModuleType:
    """The module that computes this problem."""
    code = fastest(problem.rows, problem.weight, c=lambda: cpu.is_best_for(problem.rows.dtype))
    if code is Code.TRITON:
        found = library if library.is_supported(problem) else implementation(__package__, code)
    else:
        found = cpu if code is Code.C else blocks
    log_path("grouped_gemm", found.__name__.rpartition(".")[2])
    return found


def _problem(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    scatter_weights: Tensor | None,
    num_rows: int | None,
) -> Problem:
    """The operands as paths want them, with offsets checked where that does not stop a GPU."""
    gather_index, scatter_index = (
        None if index is None else index.to(torch.int64).contiguous() for index in (gather_index, scatter_index)
    )
    weights = None if scatter_weights is None else scatter_weights.detach().contiguous()
    operands = (rows.detach().contiguous(), weight.detach().contiguous(), offsets.contiguous())
    problem = Problem(*operands, gather_index, scatter_index, weights, num_rows)
    check_offsets(problem)
    return problem


@torch.library.custom_op("leanmill::grouped_gemm", mutates_args=())
def _product(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    scatter_weights: Tensor | None,
    num_rows: int | None,
) -> Tensor:
    return _forward(rows, weight, offsets, gather_index, scatter_index, scatter_weights, num_rows)


def _forward(*operands: Any) -> Tensor:
    problem = _problem(*operands)
    # Products are computed in the dtype they are given, whatever autocast says.
    with torch.autocast(problem.rows.device.type, enabled=False):
        return path(problem).forward(problem)  # type: ignore[no-any-return]


@_product.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    scatter_weights: Tensor | None,
    num_rows: int | None,
) -> Tensor:
    return rows.new_empty(_shape(rows, weight, gather_index, scatter_index, num_rows))


@torch.library.custom_op("leanmill::grouped_gemm_backward", mutates_args=())
def _product_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    scatter_weights: Tensor | None,
    num_rows: int | None,
    needed: list[bool],
) -> list[Tensor]:
    return _backward(grad, rows, weight, offsets, gather_index, scatter_index, scatter_weights, num_rows, needed)


def _backward(grad: Tensor, *operands_and_needed: Any) -> list[Tensor]:
    *operands, needed = operands_and_needed
    problem = _problem(*operands)
    with torch.autocast(problem.rows.device.type, enabled=False):
        found = path(problem).backward(problem, grad.contiguous(), Needed(*needed))
    given = (found.rows, found.weight, found.scatter_weights)
    return [gradient for gradient in given if gradient is not None]


@_product_backward.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    scatter_weights: Tensor | None,
    num_rows: int | None,
    needed: list[bool],
) -> list[Tensor]:
    wanted = zip((rows, weight, scatter_weights), needed, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, is_needed in wanted if is_needed and tensor is not None]


def _shape(
    rows: Tensor, weight: Tensor, gather_index: Tensor | None, scatter_index: Tensor | None, num_rows: int | None
) -> tuple[int, int]:
    """Shape of the product."""
    if scatter_index is not None:
        return scatter_index.shape[0], weight.shape[1]
    if gather_index is None:
        return rows.shape[0], weight.shape[1]
    return gather_index.numel() if num_rows is None else num_rows, weight.shape[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_rows = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor, compute: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[place] for place in (0, 1, 5)]
    found = iter(compute(grad, *ctx.saved_tensors, ctx.num_rows, needed))
    rows, weight, scatter_weights = (next(found) if is_needed else None for is_needed in needed)
    return rows, weight, None, None, None, scatter_weights, None


def _through_op(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, _product_backward)


_product.register_autograd(_through_op, setup_context=_save)


class _Operands(torch.autograd.Function):
    """Saves the operands before anything is computed, and computes all gradients.

    Checkpointing repeats a forward up to the last tensor that it saved. A function that saves its
    operands after its product, as functions do, would have that product repeated; this one stands
    before it and hands on an empty tensor of the product's shape, which collects its gradient.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        *tensors, ctx.num_rows = operands
        ctx.save_for_backward(*tensors)
        rows, weight, _, gather_index, scatter_index, _, num_rows = operands
        shape = _shape(rows, weight, gather_index, scatter_index, num_rows)
        return rows.new_empty(()).expand(shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _gradients(ctx, grad, _backward)


class _Compute(torch.autograd.Function):
    """The product; its gradient is handed to `_Operands`."""

    @staticmethod
    def forward(ctx: Any, collector: Tensor, *operands: Any) -> Tensor:
        return _forward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *(None,) * 7
