"""The operators behind `op.py`: divergence, cross-entropy and their gradients, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import Code, choose
from leanmill.kernels.linear_cross_entropy import chunks
from leanmill.kernels.linear_cross_entropy.chunks import Results, Wanted
from leanmill.kernels.linear_cross_entropy.operators import check_range
from leanmill.kernels.linear_kl import rows
from leanmill.kernels.linear_kl.naive import Form


_LOGITS_ALIVE = 6
"""Tensors [rows, V] that tensor code holds at once, counted in the student's dtype."""


@torch.library.custom_op("leanmill::linear_kl", mutates_args=())
def summed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    indices: Tensor | None,
    log_probs: Tensor | None,
    log_tail: Tensor | None,
    kind: str,
    beta: float,
    temperature: float,
    divergence_weight: float,
    cross_entropy_weight: float | None,
    chunk_tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, divergence and cross-entropy and gradients of the total, empty where not wanted; flat tokens."""
    form = Form(kind, beta, temperature, divergence_weight, cross_entropy_weight)  # type: ignore[arg-type]
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    if indices is not None:
        assert log_probs is not None
        return _run(hidden, weight, bias, labels, (indices, log_probs, log_tail), form, chunk_tokens, wanted)
    assert teacher_hidden is not None
    assert teacher_weight is not None
    head = teacher_weight[: weight.shape[0]]
    head_bias = None if teacher_bias is None else teacher_bias[: weight.shape[0]]

    def logits_of(part: slice) -> Tensor:
        return torch.nn.functional.linear(teacher_hidden[part], head, head_bias)

    return _run(hidden, weight, bias, labels, logits_of, form, chunk_tokens, wanted)


@summed.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, exact, exact)
    gradients = [
        hidden.new_empty(shape if wanted else (0,), dtype=dtype if wanted else hidden.dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, args[-3:], strict=True)
    ]
    return (*(hidden.new_empty((), dtype=exact) for _ in range(3)), *gradients)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.dtype = inputs[-3:], inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


def _scaled(ctx: Any, of_total: Tensor | None) -> list[Tensor | None]:
    if of_total is None:
        return [None] * 3
    return [
        (gradient.to(of_total.dtype) * of_total).to(ctx.dtype) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]


def _scale_gradients(ctx: Any, of_total: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_scaled(ctx, of_total), *(None,) * 16)


summed.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class Provided(torch.autograd.Function):
    """The same with a Python function for a teacher, which a custom operator cannot take."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logits_of: Callable[[slice], Tensor],
        form: Form,
        chunk_tokens: int,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _run(hidden, weight, bias, labels, logits_of, form, chunk_tokens, Wanted(*wanted))
        ctx.wanted, ctx.dtype = wanted, hidden.dtype
        ctx.save_for_backward(*found[3:])
        ctx.mark_non_differentiable(*found[1:3])
        return found[:3]

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_scaled(ctx, of_total), *(None,) * 5)


Source = Callable[[slice], Tensor] | tuple[Tensor, Tensor, Tensor | None]
"""Teacher logits of some tokens, or top-k indices, log-probabilities and, if known, tails of all."""


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    source: Source,
    form: Form,
    chunk_tokens: int,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    divergences = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    divergence_ = _row_function(hidden)
    if form.cross_entropy_weight is not None and hidden.device.type == "cpu":
        check_range(labels, labels >= 0, weight.shape[0])

    def row_loss(logits: Tensor, part: slice) -> Tensor:
        """Leave the divergences aside and return cross-entropy."""
        targets, wants_gradient = labels[part], bool(wanted)
        if isinstance(source, tuple):
            indices, log_probs, log_tail = source
            tail = None if log_tail is None else log_tail[part]
            cache = (indices[part], log_probs[part], tail)
            found = rows.top_k_divergence_(logits, *cache, targets, form, wants_gradient=wants_gradient)
        else:
            teacher = source(part).detach()
            found = divergence_(logits, teacher, targets, form, wants_gradient=wants_gradient)
        divergences[part] = found[0]
        return found[1]

    chunk_rows = chunks.rows_a_chunk(hidden, weight, chunk_tokens or None, logits_alive=_LOGITS_ALIVE)
    results: Results = chunks.run(hidden, weight, bias, row_loss, wanted, chunk_rows)
    divergence, cross_entropy = divergences.sum(), results.losses.sum()
    total = form.divergence_weight * divergence + (form.cross_entropy_weight or 0.0) * cross_entropy
    gradients = [hidden.new_empty(0) if g is None else g for g in (results.hidden, results.weight, results.bias)]
    return total, divergence, cross_entropy, gradients[0], gradients[1], gradients[2]


def _row_function(hidden: Tensor) -> Any:
    if choose("linear_kl", hidden, c=None) is Code.TENSORS:
        return rows.divergence_
    from leanmill.kernels.linear_kl import kernel

    return kernel.divergence_
