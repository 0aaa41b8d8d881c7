"""One entry for cross-entropy from hidden states and head weight, choosing the path by device and dtype."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.kernels.dispatch import choose, implementation, log_path
from leanmill.kernels.linear_cross_entropy import chunks, cpu, liger
from leanmill.kernels.linear_cross_entropy.chunks import Results, Wanted
from leanmill.kernels.linear_cross_entropy.naive import Form
from leanmill.kernels.sharded import TokenLayout, is_dtensor, mean_over_kept


log = logging.getLogger(__name__)

Reduction = Literal["sum", "mean", "none"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of a linear head, never holding logits for all tokens.

    With x = W h + b, z = c tanh(s x / c) (z = s x without a cap), lse = logsumexp(z), a token costs

        (1 - e) (lse - z_label) + e (lse - mean(z)) + k lse^2

    where s is `logit_scale`, c `softcap`, e `label_smoothing` and k `z_loss` (Chowdhery et al. 2022,
    arXiv:2204.02311, section 5). Logits are made in the operands' dtype and everything after them in
    fp32. For `sum` and `mean` the gradients are built in the forward pass, chunk by chunk (as Liger
    does, Hsu et al. 2024, arXiv:2410.10989), with the weight's added up in fp32; `none` makes the
    logits again in backward.

    Hidden states and labels may be DTensors sharded on tokens. `none` then returns one placed like
    them, `sum` and `mean` a Replicate one over all tokens. Weight and bias are Replicate DTensors,
    whose gradient is a pending sum over ranks, or plain if they need none.

    Args:
        hidden: [..., H], fp32, bf16, fp16 or fp64.
        weight: [V, H], same dtype.
        labels: [...] int64 below V, or `ignore_index`.
        bias: [V], same dtype.
        ignore_index: Label of tokens that cost nothing and get no gradient.
        reduction: `sum`, `mean` over the tokens with a label (over none, NaN with a gradient of 0, as in torch), or
            `none`.
        logit_scale: s.
        softcap: c > 0, or None.
        z_loss: k >= 0.
        label_smoothing: e in [0, 1).
        chunk_tokens: Tokens whose logits exist at once; None chooses by memory.

    Returns:
        fp32 (fp64 for fp64): a scalar, or [...] for `none`.

    Raises:
        ValueError: Shapes, dtypes, devices, placements or ranges do not fit.
    """
    _check(hidden, weight, labels, bias)
    form = _form(logit_scale, softcap, z_loss, label_smoothing)
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction {reduction!r} is not known; use 'sum', 'mean' or 'none'")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1, or None")
    if is_dtensor(hidden):
        layout = TokenLayout.of("hidden", hidden)
        local_bias = None if bias is None else layout.whole("bias", bias)
        operands = (layout.local("hidden", hidden), layout.whole("weight", weight), layout.local("labels", labels))
        if reduction == "none":
            return layout.spread(_losses(*operands, local_bias, form, ignore_index, chunk_tokens))
        total = layout.total(_total(*operands, local_bias, form, ignore_index, chunk_tokens))
    elif reduction == "none":
        return _losses(hidden, weight, labels, bias, form, ignore_index, chunk_tokens)
    else:
        total = _total(hidden, weight, labels, bias, form, ignore_index, chunk_tokens)
    return mean_over_kept(total, labels, ignore_index) if reduction == "mean" else total


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    form: Form,
    ignore_index: int,
    chunk_tokens: int | None,
) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    settings = (form.scale, form.softcap, form.z_loss, form.label_smoothing, ignore_index, chunk_tokens or 0)
    return _token_losses(rows, weight, bias, labels.reshape(-1), *settings).view(labels.shape)


def _total(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    form: Form,
    ignore_index: int,
    chunk_tokens: int | None,
) -> Tensor:
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    is_tracing = torch.compiler.is_compiling()
    # A rank may hold no tokens, with which Liger divides by zero.
    if liger.covers(rows.device.type, rows.dtype, form, chunk_tokens, is_tracing=is_tracing) and len(rows):
        log_path("linear_cross_entropy", "Liger")
        return liger.summed(rows, weight, bias, targets, ignore_index)
    settings = (form.scale, form.softcap, form.z_loss, form.label_smoothing, ignore_index, chunk_tokens or 0)
    track = torch.is_grad_enabled()
    wanted = [track and t is not None and t.requires_grad for t in (rows, weight, bias)]
    return _summed(rows, weight, bias, targets, *settings, *wanted)[0]


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    given = f"hidden {_describe(hidden)}, weight {_describe(weight)}, labels {_describe(labels)}"
    tensors = [t for t in (hidden, weight, labels, bias) if t is not None]
    if any(is_dtensor(t) for t in tensors) and not is_dtensor(hidden):
        raise ValueError(
            f"{given}: hidden is plain and others are DTensors; for the loss of this rank's tokens call "
            f"weight.full_tensor(grad_placements=[Partial()] * mesh.ndim) and labels.to_local(), for that of all "
            f"give hidden as a DTensor sharded on tokens"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{given}: expected hidden [..., H] and weight [V, H] with one H and V >= 1")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{given}: expected one label a hidden state, shape {tuple(hidden.shape[:-1])}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{given}: labels must be int64; call labels.long()")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"{given}, bias {_describe(bias)}: expected bias [V] in the weight's dtype")
    if hidden.dtype not in _DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(f"{given}: expected one dtype of fp32, bf16, fp16 and fp64; cast one of them")
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"devices {[str(t.device) for t in tensors]} differ; move all tensors to one")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _form(logit_scale: float, softcap: float | None, z_loss: float, label_smoothing: float) -> Form:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0, or None for no cap")
    if not z_loss >= 0:
        raise ValueError(f"z_loss={z_loss} must be at least 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
    return Form(float(logit_scale), float(softcap or 0.0), float(z_loss), float(label_smoothing))


# The summed loss with the gradients of its sum.


@torch.library.custom_op("leanmill::linear_cross_entropy", mutates_args=())
def _summed(
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
    form = Form(scale, softcap, z_loss, label_smoothing)
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    results = _run(hidden, weight, bias, labels, form, ignore_index, chunk_tokens, wanted, None)
    nothing = functools.partial(hidden.new_empty, 0)
    gradients = [nothing() if g is None else g for g in (results.hidden, results.weight, results.bias)]
    return results.losses.sum(), gradients[0], gradients[1], gradients[2]


@_summed.register_fake
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


_summed.register_autograd(_scale_gradients, setup_context=_keep_gradients)


# Losses of single tokens.


@torch.library.custom_op("leanmill::linear_cross_entropy_tokens", mutates_args=())
def _token_losses(
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
    form = Form(scale, softcap, z_loss, label_smoothing)
    nothing = Wanted(hidden=False, weight=False, bias=False)
    return _run(hidden, weight, bias, labels, form, ignore_index, chunk_tokens, nothing, None).losses


@_token_losses.register_fake
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


_token_losses.register_autograd(_recompute, setup_context=_keep_operands)


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
