"""One entry for gated experts, differentiable, on every device."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import log_path
from leanmill.kernels.gated_experts import cpu, products
from leanmill.kernels.gated_experts.experts import Experts, Needed
from leanmill.kernels.grouped_gemm.checks import check_offsets, checked
from leanmill.kernels.grouped_gemm.cpu import is_best_for
from leanmill.kernels.native.dtypes import is_plain_cpu
from leanmill.kernels.sharded import is_dtensor


def gated_experts(
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    *,
    num_rows: int | None = None,
) -> Tensor:
    """Return the sum over each token's experts of `weight * down[e] @ swiglu(gate_up[e] @ token)`.

    What `grouped_gemm` and `swiglu` compute one after the other, as one operation: the gate is taken
    while products are stored, and what backward keeps is the operands and the rows of gate and up.
    Products and sums are fp32 (fp64 for fp64), each result is rounded once, and all repeat bitwise; on
    CPUs that multiply pairs of bf16 in vectors (AVX-512 BF16), gradients times combine weights are rounded
    to bf16 before they are multiplied for a weight's gradient.

    Args:
        tokens: [T, H]; fp32, bf16, fp16 or fp64.
        gate_up: [E, 2I, H], gate before up, same dtype and device.
        down: [E, H, I], likewise.
        offsets: End row of each expert [E] int32 or int64, as in `grouped_gemm`.
        positions: [T, K] int64: sorted row of each copy, of `sort_by_expert`.
        weights: [T, K] combine weights.
        num_rows: Rows that are stored, where not all copies have an expert, as in `grouped_gemm`.

    Returns:
        [T, H].

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, a DTensor, or, on the CPU, offsets or
            positions that point outside.
    """
    arguments = (tokens, gate_up, down, offsets, positions, weights, num_rows)
    _check(*arguments)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _experts(*arguments, torch.is_grad_enabled())[0]
    if not any(t.requires_grad for t in (tokens, gate_up, down, weights)):
        return _experts(*arguments, False)[0]
    experts = _operands(*arguments)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        kept, hidden = _path(experts).up(experts, keep=True)
    collector = _Operands.apply(*arguments, kept)
    return _Down.apply(collector, experts, hidden)  # type: ignore[no-any-return]


def _check(
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None,
) -> None:
    checked(tokens, gate_up, offsets, positions, positions, weights, num_rows)
    if is_dtensor(down):
        raise ValueError("down is a DTensor; pass down.full_tensor(grad_placements=[Partial()] * mesh.ndim)")
    shapes = f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}"
    if down.dim() != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        raise ValueError(f"{shapes} do not fit: they must be [E, 2I, H] and [E, H, I]")
    if down.dtype != gate_up.dtype or down.device != gate_up.device:
        raise ValueError(f"{shapes} are {gate_up.dtype} on {gate_up.device} and {down.dtype} on {down.device}")


def _path(experts: Experts) -> ModuleType:
    """The module that computes this."""
    operands = (experts.tokens, experts.gate_up, experts.down)
    found = cpu if is_plain_cpu(*operands) and is_best_for(experts.tokens.dtype) else products
    log_path("gated_experts", "C" if found is cpu else "two products")
    return found


def _operands(
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None,
) -> Experts:
    """The operands as paths want them, with offsets checked where that does not stop a GPU."""
    tokens, gate_up, down, weights = (t.detach().contiguous() for t in (tokens, gate_up, down, weights))
    offsets, positions = (t.to(torch.int64).contiguous() for t in (offsets, positions))
    experts = Experts(tokens, gate_up, down, offsets, positions, weights, num_rows)
    check_offsets(experts.up_problem())
    return experts


@torch.library.custom_op("leanmill::gated_experts", mutates_args=())
def _experts(
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None,
    keep: bool,  # noqa: FBT001 (an operator's schema knows no keywords here)
) -> tuple[Tensor, Tensor]:
    experts = _operands(tokens, gate_up, down, offsets, positions, weights, num_rows)
    path = _path(experts)
    with torch.autocast(tokens.device.type, enabled=False):
        kept, hidden = path.up(experts, keep=keep)
        out = path.down(experts, hidden)
    return out, tokens.new_empty(0) if kept is None else kept


@_experts.register_fake
def _(
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None,
    keep: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    rows = positions.numel() if num_rows is None else num_rows
    kept = tokens.new_empty(rows, gate_up.shape[1]) if keep else tokens.new_empty(0)
    return tokens.new_empty(tokens.shape), kept


@torch.library.custom_op("leanmill::gated_experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor,
    kept: Tensor,
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None,
    needed: list[bool],
) -> list[Tensor]:
    return _backward(grad, kept, tokens, gate_up, down, offsets, positions, weights, num_rows, needed)


def _backward(grad: Tensor, kept: Tensor, *operands_and_needed: Any) -> list[Tensor]:
    *operands, needed = operands_and_needed
    experts = _operands(*operands)
    with torch.autocast(grad.device.type, enabled=False):
        found = _path(experts).backward(experts, kept, grad.contiguous(), Needed(*needed))
    given = (found.tokens, found.gate_up, found.down, found.weights)
    return [gradient for gradient in given if gradient is not None]


@_experts_backward.register_fake
def _(
    grad: Tensor,
    kept: Tensor,
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None,
    needed: list[bool],
) -> list[Tensor]:
    wanted = zip((tokens, gate_up, down, weights), needed, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, is_needed in wanted if is_needed]


def _gradients(ctx: Any, grad: Tensor, compute: Callable[..., list[Tensor]]) -> list[Tensor | None]:
    """Gradients of the seven operands."""
    needed = [ctx.needs_input_grad[place] for place in (0, 1, 2, 5)]
    *operands, kept = ctx.saved_tensors
    found = iter(compute(grad, kept, *operands, ctx.num_rows, needed))
    tokens, gate_up, down, weights = (next(found) if is_needed else None for is_needed in needed)
    return [tokens, gate_up, down, None, None, weights, None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_rows, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _through_op(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, _experts_backward), None


_experts.register_autograd(_through_op, setup_context=_save)


class _Operands(torch.autograd.Function):
    """Saves what backward needs, and computes all gradients.

    It stands before the second product, so that checkpointing, which repeats a forward up to the last
    tensor that it saved, does not repeat that product. It hands on an empty tensor of the product's
    shape, which collects its gradient.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        *tensors, ctx.num_rows, kept = operands
        ctx.save_for_backward(*tensors, kept)
        tokens: Tensor = tensors[0]
        return tokens.new_empty(()).expand(tokens.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_gradients(ctx, grad, _backward), None


class _Down(torch.autograd.Function):
    """The second product; its gradient is handed to `_Operands`."""

    @staticmethod
    def forward(ctx: Any, collector: Tensor, experts: Experts, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _path(experts).down(experts, hidden)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, None
