"""Sorting token copies by expert and bringing them back: one entry each, on every device.

The T x K copies of T tokens, K chosen experts each, are sorted by expert, stably: copies of one
expert stay in the order of their tokens. `positions[t, k]` is the sorted row of token t's k-th copy,
`order` its inverse (`order[i] = t * K + k`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmill.kernels.dispatch import choose, implementation
from leanmill.kernels.moe_permute import cpu, naive
from leanmill.kernels.sharded import is_dtensor


class Permuted(NamedTuple):
    """Token copies in the order of their experts."""

    rows: Tensor
    """[N, H], N = T x K: each copy's token."""
    order: Tensor
    """[N] int64: the copy t * K + k that each sorted row is."""
    positions: Tensor
    """[T, K] int64: the sorted row of each copy."""
    counts: Tensor
    """[E] int64: copies each expert takes."""


def moe_permute(x: Tensor, top_k_index: Tensor, num_experts: int) -> Permuted:
    """Copy each token to its experts' blocks of rows; differentiable in `x`.

    Args:
        x: Tokens [T, H].
        top_k_index: Experts [T, K] int64 in [0, num_experts); `num_experts` itself stands for "no
            expert", and such copies come last. On a GPU the range is not checked.
        num_experts: E.

    Raises:
        ValueError: Shapes that do not fit, an index outside the range, or a DTensor.
    """
    order, positions, counts = sort_by_expert(top_k_index, num_experts)
    _check_tokens("x", x, top_k_index)
    return Permuted(_spread(x, positions, None, None), order, positions, counts)


def spread_rows(tokens: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    """Copy tokens to the first `num_rows` places of their sorted order; differentiable in `tokens`.

    Args:
        tokens: [T, H].
        positions: [T, K] int64 as `sort_by_expert` returned them.
        num_rows: Rows to return, 0 to T x K; copies with places from there on are left out, which are
            those of no expert where it is the sum of the counts.

    Raises:
        ValueError: Shapes that do not fit, or a DTensor.
    """
    _check_index("positions", positions)
    _check_tokens("tokens", tokens, positions)
    if not 0 <= num_rows <= positions.numel():
        raise ValueError(
            f"num_rows is {num_rows}; with positions {tuple(positions.shape)} it must be 0 to their number"
        )
    return _spread(tokens, positions, None, num_rows)


def moe_unpermute(rows: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return tokens [T, H]: `sum_k weights[t, k] * rows[positions[t, k]]`, differentiable in both.

    Summed over k in order, in fp32, and rounded once, so results repeat bitwise.

    Args:
        rows: [N, H] in sorted order, N up to T x K: copies with places from N on add nothing.
        positions: [T, K] int64 as `moe_permute` returned them.
        weights: Combine weights [T, K]; none stands for ones.

    Raises:
        ValueError: Shapes that do not fit, or a DTensor.
    """
    _check_index("positions", positions)
    _check_plain(rows=rows, weights=weights)
    if rows.dim() != 2 or rows.shape[0] > positions.numel():
        raise ValueError(
            f"rows {tuple(rows.shape)} and positions {tuple(positions.shape)} do not fit: rows must be "
            f"[{positions.numel()}, H], one for each entry of positions, or the first of these"
        )
    if weights is not None and weights.shape != positions.shape:
        raise ValueError(f"weights {tuple(weights.shape)} must have the shape of positions {tuple(positions.shape)}")
    return _combine(rows, positions, weights)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (order [N], positions [T, K], counts [E]); see `moe_permute`.

    Counting places each copy directly, in a time that does not depend on the order of the input.
    """
    _check_index("top_k_index", top_k_index)
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1")
    return _sort_by_expert(top_k_index, num_experts)


def order_of_positions(positions: Tensor) -> Tensor:
    """Return `order` [N] for `positions` [T, K]; on the CPU, ValueError where they are no permutation."""
    if positions.device.type == "cpu" and cpu.library() is not None:
        return cpu.invert(positions)
    return naive.invert(positions)


def _check_plain(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and is_dtensor(tensor):
            raise ValueError(
                f"{name} is a DTensor; a permutation moves rows past the ends of a shard, so each rank permutes its "
                f"own tokens: pass {name}.to_local()"
            )


def _check_index(name: str, index: Tensor) -> None:
    _check_plain(**{name: index})
    if index.dim() != 2 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is {index.dtype} {tuple(index.shape)}; it must be int64 or int32 [T, K]")


def _check_tokens(name: str, tokens: Tensor, index: Tensor) -> None:
    _check_plain(**{name: tokens})
    if tokens.dim() != 2 or tokens.shape[0] != index.shape[0] or not tokens.is_floating_point():
        raise ValueError(
            f"{name} is {tokens.dtype} {tuple(tokens.shape)}; with an index {tuple(index.shape)} it must be "
            f"floating [{index.shape[0]}, H]"
        )


def _path(*tensors: Tensor) -> ModuleType:
    """The module that computes for these tensors."""
    return implementation(__package__, choose("moe_permute", *tensors, c=cpu.library))


@torch.library.custom_op("leanmill::sort_by_expert", mutates_args=())
def _sort_by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _path(index).sort_by_expert(index.to(torch.int64).contiguous(), num_experts)


@_sort_by_expert.register_fake
def _(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = index.new_empty(index.numel(), dtype=torch.int64)
    return order, index.new_empty(index.shape, dtype=torch.int64), order.new_empty(num_experts)


@torch.library.custom_op("leanmill::spread_rows", mutates_args=())
def _spread(tokens: Tensor, positions: Tensor, weights: Tensor | None, num_rows: int | None) -> Tensor:
    return _path(tokens).spread(tokens.contiguous(), positions.to(torch.int64).contiguous(), weights, num_rows)


@_spread.register_fake
def _(tokens: Tensor, positions: Tensor, weights: Tensor | None, num_rows: int | None) -> Tensor:
    return tokens.new_empty(positions.numel() if num_rows is None else num_rows, tokens.shape[1])


@torch.library.custom_op("leanmill::combine_rows", mutates_args=())
def _combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    return _path(rows).combine(rows.contiguous(), positions.to(torch.int64).contiguous(), weights)


@_combine.register_fake
def _(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


@torch.library.custom_op("leanmill::dot_rows", mutates_args=())
def _dots(rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    return _path(rows).dots(rows.contiguous(), positions.to(torch.int64).contiguous(), tokens.contiguous())


@_dots.register_fake
def _(rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    return rows.new_empty(positions.shape, dtype=torch.promote_types(rows.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operand, positions, weights = inputs[:3]
    ctx.num_rows = operand.shape[0]
    # Only the gradient of the weights looks at the operand.
    ctx.save_for_backward(operand if ctx.needs_input_grad[2] else None, positions, weights)


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    tokens, positions, weights = ctx.saved_tensors
    grad_tokens = _combine(grad, positions, weights) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[2]:
        return grad_tokens, None, None, None
    return grad_tokens, None, _dots(grad, positions, tokens).to(weights.dtype), None


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    rows, positions, weights = ctx.saved_tensors
    grad_rows = _spread(grad, positions, weights, ctx.num_rows) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[2]:
        return grad_rows, None, None
    return grad_rows, None, _dots(rows, positions, grad).to(weights.dtype)


_spread.register_autograd(_spread_backward, setup_context=_save)
_combine.register_autograd(_combine_backward, setup_context=_save)
