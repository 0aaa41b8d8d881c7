"""One entry for divergences of linear heads, whatever form the teacher comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanmill.kernels.linear_kl.naive import KINDS, Form, Kind, top_k_of
from leanmill.kernels.linear_kl.operators import Provided, logits_source, summed
from leanmill.kernels.sharded import TokenLayout, is_dtensor, mean_over_kept


@dataclass(frozen=True)
class TeacherHead:
    """A teacher given as what its head sees, and the head."""

    hidden: Tensor
    """[..., H of the teacher], with the student's leading dims."""
    weight: Tensor
    """[V of the teacher, H of the teacher], same dtype."""
    bias: Tensor | None = None
    top_k: int | None = None
    """Compare only its k largest probabilities, and the rest of its mass as one more bucket; None compares all."""


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher given as a function that makes or reads logits of some tokens."""

    logits_of: Callable[[slice], Tensor]
    """Returns logits [n, V of the teacher] of the flattened tokens in a slice with start and stop.
    With DTensors for hidden states: plain logits, of the tokens that this rank holds."""
    top_k: int | None = None
    """See `TeacherHead`."""


@dataclass(frozen=True)
class TopK:
    """A teacher given as its largest probabilities; what they leave is one more bucket.

    A peaked teacher's log-probabilities round to a sum of 1, which says of the rest only that it is
    small. A reverse divergence depends on how small: keep `log_tail` with the cache (`TopK.of` does).
    """

    indices: Tensor
    """[..., k] int64, distinct in a row, of the largest probabilities."""
    log_probs: Tensor
    """[..., k] under softmax(teacher logits / T), with the T of the loss."""
    log_tail: Tensor | None = None
    """[...], log of the probability of all other tokens together; None takes log(1 - sum p), and
    where rounding hides that, the largest it can be. With k = V the tail is empty, whatever this says."""

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
        """Return what is to be kept of teacher logits [..., V], at least fp32."""
        return cls(*top_k_of(logits.detach(), k, temperature))


Teacher = TeacherHead | TeacherLogits | TopK


@dataclass(frozen=True)
class Losses:
    """Sums over tokens with a label."""

    total: Tensor
    """The weighted sum, which is what backward is for."""
    divergence: Tensor
    cross_entropy: Tensor


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher: Teacher,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "mean"] = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return T^2 x the divergence between teacher and student, never holding logits for all tokens.

    With teacher p and student q, both softmax(logits / T) over the vocabulary (or over k + 1 buckets
    of a top-k cache): `forward` is KL(p || q), `reverse` KL(q || p), and `js` is
    b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q (Agarwal et al. 2023, arXiv:2306.13649,
    eq. 1; unlike there, its ends b = 0 and 1 are not redefined as the two KLs but refused). `skew_forward` is
    KL(p || b p + (1 - b) q) and `skew_reverse` KL(q || (1 - b) p + b q) (Ko et al. 2024, arXiv:2402.03898, eq. 2
    and 6), `blend` b KL(q || p) + (1 - b) KL(p || q), `total_variation` half the sum of |p - q|. `mse` is the mean
    over the vocabulary of the squared difference of logits, whatever T. `deviation` is H^b KL(p || q), in which
    H = -sum p log q counts as a constant; it has tensor code only. T^2
    follows Hinton et al. 2015 (arXiv:1503.02531). Gradients go to the student only, and are built
    in the forward pass as in `linear_cross_entropy`.

    Hidden states and labels may be DTensors sharded on tokens, and the teacher's hidden states or
    cache are then placed like them; losses are Replicate and those of all tokens. Weights and biases
    are Replicate DTensors, whose gradient is a pending sum over ranks, or plain if they need none.

    Args:
        hidden: Student hidden states [..., H], fp32, bf16, fp16 or fp64.
        weight: Student head [V, H], same dtype.
        bias: [V], same dtype.
        teacher: In one of three forms. Vocabularies of different size are compared over the rows
            that both have.
        kind: Which divergence.
        beta: b of `js`, `skew_forward`, `skew_reverse` and `blend`, in (0, 1), and of `deviation`, above 0.
        temperature: T > 0.
        labels: [...] int64; tokens with `ignore_index` cost nothing. None counts all.
        ignore_index: See `labels`.
        reduction: `sum`, or `mean` over the tokens counted (over none, NaN with a gradient of 0).
        chunk_tokens: Tokens whose logits exist at once; None chooses by memory.

    Returns:
        A scalar, fp32 (fp64 for fp64).

    Raises:
        ValueError: Shapes, dtypes, devices, placements or ranges do not fit.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction {reduction!r} is not known; use 'sum' or 'mean'")
    form = _form(kind, beta, temperature)
    if labels is None:
        labels = _any_labels(hidden)
    total = _losses(hidden, weight, bias, labels, teacher, form, ignore_index, chunk_tokens).total
    return mean_over_kept(total, labels, ignore_index) if reduction == "mean" else total


def linear_kl_and_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    teacher: Teacher,
    divergence_weight: float,
    cross_entropy_weight: float,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Losses:
    """Return both losses of distillation from one set of logits: see `linear_kl` for the arguments.

    Args:
        hidden: Student hidden states [..., H].
        weight: Student head [V, H].
        labels: [...] int64 below V, or `ignore_index`.
        bias: [V].
        teacher: See `linear_kl`.
        divergence_weight: Weight of the divergence in `total`.
        cross_entropy_weight: Weight of cross-entropy (of softmax(logits), without T) in `total`.
        kind: See `linear_kl`.
        beta: See `linear_kl`.
        temperature: See `linear_kl`.
        ignore_index: See `linear_kl`.
        chunk_tokens: See `linear_kl`.

    Returns:
        Sums; a weight of 0 still gives the loss, without its gradient.
    """
    form = _form(kind, beta, temperature, divergence_weight, cross_entropy_weight)
    return _losses(hidden, weight, bias, labels, teacher, form, ignore_index, chunk_tokens)


def _form(kind: Kind, beta: float, temperature: float, *weights: float) -> Form:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; use one of {', '.join(KINDS)}")
    if not (beta > 0 if kind == "deviation" else 0 < beta < 1):
        raise ValueError(f"beta={beta} must lie between 0 and 1; its ends are kind='forward' and kind='reverse'")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    return Form(kind, float(beta), float(temperature), *map(float, weights))


def _any_labels(hidden: Tensor) -> Tensor:
    """Return labels with which every token counts."""
    if is_dtensor(hidden):
        layout = TokenLayout.of("hidden", hidden)
        local = layout.local("hidden", hidden)
        return layout.spread(torch.zeros(local.shape[:-1], dtype=torch.int64, device=local.device))
    return torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Teacher,
    form: Form,
    ignore_index: int,
    chunk_tokens: int | None,
) -> Losses:
    _check(hidden, weight, bias, labels, teacher, chunk_tokens)
    if form.kind == "mse" and (isinstance(teacher, TopK) or getattr(teacher, "top_k", None)):
        raise ValueError("kind 'mse' compares logits, and a top-k teacher has probabilities only; use another kind")
    if is_dtensor(hidden):
        layout = TokenLayout.of("hidden", hidden)
        local = _losses(
            layout.local("hidden", hidden),
            layout.whole("weight", weight),
            None if bias is None else layout.whole("bias", bias),
            layout.local("labels", labels),
            _local_teacher(layout, teacher),
            form,
            ignore_index,
            chunk_tokens,
        )
        return Losses(layout.total(local.total), layout.total(local.divergence), layout.total(local.cross_entropy))
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    targets = torch.where(targets == ignore_index, -1, targets)
    settings = (form.kind, form.beta, form.temperature, form.divergence_weight, form.cross_entropy_weight)
    track = torch.is_grad_enabled()
    wanted = [track and t is not None and t.requires_grad for t in (flat, weight, bias)]
    if isinstance(teacher, TeacherLogits):
        source = logits_source(teacher.logits_of, teacher.top_k or 0, form.temperature)
        found = Provided.apply(flat, weight, bias, targets, source, form, chunk_tokens or 0, wanted)
        return Losses(found[0], found[1].detach(), found[2].detach())
    tensors: list[Tensor | None] = [None] * 6
    if isinstance(teacher, TeacherHead):
        tensors[:3] = [teacher.hidden.flatten(0, -2), teacher.weight, teacher.bias]
    else:
        tail = None if teacher.log_tail is None else teacher.log_tail.flatten()
        tensors[3:] = [teacher.indices.flatten(0, -2), teacher.log_probs.flatten(0, -2), tail]
    # The teacher is a constant of this loss, whatever made it.
    constants = [None if t is None else t.detach() for t in tensors]
    top_k = (teacher.top_k or 0) if isinstance(teacher, TeacherHead) else 0
    found = summed(flat, weight, bias, targets, *constants, top_k, *settings, chunk_tokens or 0, *wanted)
    return Losses(found[0], found[1].detach(), found[2].detach())


def _local_teacher(layout: TokenLayout, teacher: Teacher) -> Teacher:
    if isinstance(teacher, TopK):
        indices = layout.local("teacher.indices", teacher.indices)
        tail = None if teacher.log_tail is None else layout.local("teacher.log_tail", teacher.log_tail.detach())
        return TopK(indices, layout.local("teacher.log_probs", teacher.log_probs.detach()), tail)
    if isinstance(teacher, TeacherHead):
        bias = None if teacher.bias is None else layout.whole("teacher.bias", teacher.bias.detach())
        weight = layout.whole("teacher.weight", teacher.weight.detach())
        return TeacherHead(layout.local("teacher.hidden", teacher.hidden.detach()), weight, bias, teacher.top_k)
    return teacher


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, teacher: Teacher, chunk_tokens: int | None
) -> None:
    given = f"student hidden {_describe(hidden)}, weight {_describe(weight)}, labels {_describe(labels)}"
    tensors = [hidden, weight, labels] if bias is None else [hidden, weight, labels, bias]
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{given}: expected hidden [..., H] of 2 dims or more and weight [V, H] with one H")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"{given}: expected one floating dtype; cast one of them")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(f"{given}: expected int64 labels of shape {tuple(hidden.shape[:-1])}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"{given}, bias {_describe(bias)}: expected bias [V] in the weight's dtype")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1, or None")
    if isinstance(teacher, TeacherHead):
        tensors += [t for t in (teacher.hidden, teacher.weight, teacher.bias) if t is not None]
        theirs = f"teacher hidden {_describe(teacher.hidden)}, weight {_describe(teacher.weight)}"
        fits = teacher.weight.dim() == 2 and teacher.hidden.shape == (*labels.shape, teacher.weight.shape[1])
        if not fits or teacher.hidden.dtype != teacher.weight.dtype:
            raise ValueError(f"{given}, {theirs}: expected {tuple(labels.shape)} hidden states for its own weight")
        shared = min(len(weight), len(teacher.weight))
        if teacher.top_k is not None and not 1 <= teacher.top_k <= shared:
            raise ValueError(f"{given}, {theirs}, top_k={teacher.top_k}: expected a top_k of 1 to {shared}")
    elif isinstance(teacher, TopK):
        tensors += [t for t in (teacher.indices, teacher.log_probs, teacher.log_tail) if t is not None]
        _check_top_k(given, teacher, tuple(labels.shape), weight.shape[0])
    if any(is_dtensor(t) for t in tensors) and not is_dtensor(hidden):
        raise ValueError(
            f"{given}: hidden is plain and others are DTensors; for the loss of this rank's tokens call "
            f"weight.full_tensor(grad_placements=[Partial()] * mesh.ndim) and to_local() on labels and caches, for "
            f"that of all give hidden as a DTensor sharded on tokens"
        )
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"devices {[str(t.device) for t in tensors]} differ; move all tensors to one")


def _check_top_k(given: str, teacher: TopK, leading: tuple[int, ...], vocab_size: int) -> None:
    indices, log_probs, tail = teacher.indices, teacher.log_probs, teacher.log_tail
    given = f"{given}, top-k indices {_describe(indices)}, log_probs {_describe(log_probs)}"
    fits = indices.shape == log_probs.shape and indices.shape[:-1] == leading
    if not fits or indices.dtype != torch.int64 or not log_probs.is_floating_point():
        raise ValueError(f"{given}: expected {leading} + (k,) of both, int64 and floating")
    if not 1 <= indices.shape[-1] <= vocab_size:
        raise ValueError(f"{given}: expected a k of 1 to {vocab_size}, the rows of the weight")
    if tail is not None and (tail.shape != leading or not tail.is_floating_point()):
        raise ValueError(f"{given}, log_tail {_describe(tail)}: expected floating {leading}, or None")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
