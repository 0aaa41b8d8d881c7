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
from leanmill.kernels.linear_kl import cpu, rows
from leanmill.kernels.linear_kl.naive import IN_TENSORS, Form, top_k_of
from leanmill.kernels.native.dtypes import SUFFIXES


_LOGITS_ALIVE = {Code.C: 2, Code.TRITON: 2, Code.TENSORS: 6}
"""Tensors [rows, V] that exist at once, counted in the student's dtype."""


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
    teacher_top_k: int,
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
    source: Source
    if indices is not None:
        assert log_probs is not None
        source = _of_cache(indices, log_probs, log_tail)
    else:
        assert teacher_hidden is not None
        assert teacher_weight is not None
        head = teacher_weight[: weight.shape[0]]
        head_bias = None if teacher_bias is None else teacher_bias[: weight.shape[0]]
        logits_of = _HeadLogits(teacher_hidden, head, head_bias)
        source = logits_source(logits_of, teacher_top_k, temperature)
    return _run(hidden, weight, bias, labels, source, form, chunk_tokens, wanted)


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
    return (*_scaled(ctx, of_total), *(None,) * 17)


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
        source: Source,
        form: Form,
        chunk_tokens: int,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _run(hidden, weight, bias, labels, source, form, chunk_tokens, Wanted(*wanted))
        ctx.wanted, ctx.dtype = wanted, hidden.dtype
        ctx.save_for_backward(*found[3:])
        ctx.mark_non_differentiable(*found[1:3])
        return found[:3]

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_scaled(ctx, of_total), *(None,) * 5)


Cached = tuple[Tensor, Tensor, "Tensor | None"]
"""Top-k indices, log-probabilities and, if known, tails of some tokens."""
Source = Callable[[slice], "Tensor | Cached"]
"""Gives a teacher's logits of some tokens, or their top-k cache."""


def _of_cache(indices: Tensor, log_probs: Tensor, log_tail: Tensor | None) -> Source:
    return lambda part: (indices[part], log_probs[part], None if log_tail is None else log_tail[part])


def logits_source(logits_of: Callable[[slice], Tensor], k: int, temperature: float) -> Source:
    """Return a source of logits, or of the `k` largest probabilities among them where that is not 0."""
    return (lambda part: top_k_of(logits_of(part).detach(), k, temperature)) if k else logits_of


class _HeadLogits:
    """A head's logits of some tokens, each time in the memory of the last."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._space: Tensor | None = None

    def __call__(self, part: slice) -> Tensor:
        num_rows = part.stop - part.start
        if self._space is None or len(self._space) < num_rows:
            self._space = self._hidden.new_empty(num_rows, len(self._weight))
        logits = torch.mm(self._hidden[part], self._weight.t(), out=self._space[:num_rows])
        return logits if self._bias is None else logits.add_(self._bias)


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
    code = Code.TENSORS if form.kind in IN_TENSORS else choose("linear_kl", hidden, c=cpu.library)
    if form.cross_entropy_weight is not None and hidden.device.type == "cpu":
        check_range(labels, labels >= 0, weight.shape[0])

    def row_loss(logits: Tensor, part: slice) -> Tensor:
        """Leave the divergences aside and return cross-entropy."""
        found = _row_losses(code, logits, source(part), labels[part], form, wants_gradient=bool(wanted))
        divergences[part] = found[0]
        return found[1]

    chunk_rows = chunks.rows_a_chunk(hidden, weight, chunk_tokens or None, logits_alive=_LOGITS_ALIVE[code])
    results: Results = chunks.run(hidden, weight, bias, row_loss, wanted, chunk_rows)
    divergence, cross_entropy = divergences.sum(), results.losses.sum()
    total = form.divergence_weight * divergence + (form.cross_entropy_weight or 0.0) * cross_entropy
    gradients = [hidden.new_empty(0) if g is None else g for g in (results.hidden, results.weight, results.bias)]
    return total, divergence, cross_entropy, gradients[0], gradients[1], gradients[2]


def _row_losses(
    code: Code, logits: Tensor, teacher: Tensor | Cached, labels: Tensor, form: Form, *, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    if isinstance(teacher, tuple):
        cached = cpu.top_k_divergence_ if code is Code.C else rows.top_k_divergence_
        return cached(logits, *teacher, labels, form, wants_gradient=wants_gradient)
    teacher = teacher.detach()
    if code is Code.TRITON:
        from leanmill.kernels.linear_kl import kernel

        return kernel.divergence_(logits, teacher, labels, form, wants_gradient=wants_gradient)
    fits_c = code is Code.C and teacher.dtype in SUFFIXES
    return (cpu if fits_c else rows).divergence_(logits, teacher, labels, form, wants_gradient=wants_gradient)
