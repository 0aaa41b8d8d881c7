"""The operators behind `op.py`: the sum with its gradients at once, or a loss a token whose backward recomputes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import choose, implementation
from leanmill.kernels.linear_cross_entropy import chunks, cpu
from leanmill.kernels.linear_cross_entropy.chunks import Results, Wanted
from leanmill.kernels.linear_cross_entropy.naive import Form


@torch.library.custom_op("leanmill::linear_cross_entropy", mutates_args=())
def summed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    chunk_tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of `op.linear_cross_entropy` and its gradients, empty where not wanted; flat tokens."""
    form = Form(scale, softcap, z_loss, label_smoothing)
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    results = _run(hidden, weight, bias, labels, form, ignore_index, chunk_tokens, wanted, None)
    nothing = functools.partial(hidden.new_empty, 0)
    gradients = [nothing() if g is None else g for g in (results.hidden, results.weight, results.bias)]
    return results.losses.sum(), gradients[0], gradients[1], gradients[2]


@summed.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    wants_hidden, wants_weight, wants_bias = args[-3:]
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty(hidden.shape) if wants_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape, dtype=exact) if wants_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=exact) if wants_bias else hidden.new_empty(0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.dtype = inputs[-3:], inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, of_total: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if of_total is None:
        return (None,) * 13
    gradients: list[Tensor | None] = []
    for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True):
        # In at least fp32, where the scale is: rounding it to the gradient's dtype would be a bias.
        gradients.append((gradient.to(of_total.dtype) * of_total).to(ctx.dtype) if wanted else None)
    return (*gradients, *(None,) * 10)


summed.register_autograd(_scale_gradients, setup_context=_keep_gradients)


# Losses of single tokens.


@torch.library.custom_op("leanmill::linear_cross_entropy_tokens", mutates_args=())
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    chunk_tokens: int,
) -> Tensor:
    """Return the loss of each of the flat tokens; backward computes logits again."""
    form = Form(scale, softcap, z_loss, label_smoothing)
    nothing = Wanted(hidden=False, weight=False, bias=False)
    return _run(hidden, weight, bias, labels, form, ignore_index, chunk_tokens, nothing, None).losses


@token_losses.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))


@torch.library.custom_op("leanmill::linear_cross_entropy_tokens_backward", mutates_args=())
def _token_gradients(
    of_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    chunk_tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    form = Form(scale, softcap, z_loss, label_smoothing)
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    found = _run(hidden, weight, bias, labels, form, ignore_index, chunk_tokens, wanted, of_losses)
    gradients = [g.to(hidden.dtype) if g is not None else hidden.new_empty(0) for g in _gradients(found)]
    return gradients[0], gradients[1], gradients[2]


@_token_gradients.register_fake
def _(of_losses: Tensor, hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    made = [hidden.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, args[-3:], strict=True)]
    return made[0], made[1], made[2]


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _recompute(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    found = _token_gradients(of_losses, *ctx.saved_tensors, *ctx.settings, *wanted)
    return (*(g if wants else None for g, wants in zip(found, wanted, strict=True)), *(None,) * 7)


token_losses.register_autograd(_recompute, setup_context=_keep_operands)


# What both share.


def _gradients(results: Results) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return results.hidden, results.weight, results.bias


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    form: Form,
    ignore_index: int,
    chunk_tokens: int,
    wanted: Wanted,
    row_scales: Tensor | None,
) -> Results:
    kept = labels != ignore_index
    if hidden.device.type != "cpu":
        # Counting the tokens with a label would wait for the device.
        return _run_rows(hidden, weight, bias, torch.where(kept, labels, -1), form, chunk_tokens, wanted, row_scales)
    check_range(labels, kept, weight.shape[0])
    if kept.all():
        return _run_rows(hidden, weight, bias, labels, form, chunk_tokens, wanted, row_scales)
    index = kept.nonzero().squeeze(-1)
    scales = None if row_scales is None else row_scales[index]
    found = _run_rows(hidden[index], weight, bias, labels[index], form, chunk_tokens, wanted, scales)
    losses = found.losses.new_zeros(len(hidden)).index_copy_(0, index, found.losses)
    of_hidden = None if found.hidden is None else torch.zeros_like(hidden).index_copy_(0, index, found.hidden)
    return Results(losses, of_hidden, found.weight, found.bias)


def check_range(labels: Tensor, kept: Tensor, vocab_size: int) -> None:
    """Raise ValueError for a kept label that is no row of the weight; waits for the labels' device."""
    outside = labels[kept & ((labels < 0) | (labels >= vocab_size))]
    if len(outside):
        raise ValueError(f"label {int(outside[0])} is no row of the weight; labels must lie in [0, {vocab_size})")


def _run_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    form: Form,
    chunk_tokens: int,
    wanted: Wanted,
    row_scales: Tensor | None,
) -> Results:
    row_function = _row_function(hidden)

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        scales = None if row_scales is None else row_scales[rows]
        return row_function(logits, labels[rows], scales, form, wants_gradient=bool(wanted))  # type: ignore[no-any-return]

    chunk_rows = chunks.rows_a_chunk(hidden, weight, chunk_tokens or None)
    return chunks.run(hidden, weight, bias, row_loss, wanted, chunk_rows)


def _row_function(hidden: Tensor) -> Any:
    return implementation(__package__, choose("linear_cross_entropy", hidden, c=cpu.library)).cross_entropy_
