"""Three ways to a micro-batch's losses: in the head's call, in the head's place, or from logits.

`choose_path` picks one for a model and its terms. The first two never hold all logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.batches import Batch
from leanmill.core.encoders import is_encoder
from leanmill.core.errors import ConfigError
from leanmill.core.head import HeadForm, head_extras, known_head_form
from leanmill.core.head_loss import HeadLoss, head_cross_entropy, is_plain_head, is_split_head
from leanmill.core.losses import GroupLossTerm, HeadLossTerm, LmLossTerm, LossTerm, TokenLossTerm
from leanmill.core.operands import recomputed
from leanmill.trainer.losses import loss_in_head, loss_on_body, model_inputs


AUTO_CHUNK_BYTES = 256 * 2**20
"""Where logits are made at all, `auto` keeps those of a micro-batch at once up to this size (fp32)."""

ChunkTokens = int | Literal["auto"]
_OfLogits = Callable[[Tensor, Tensor, "list[Mapping[str, Tensor]]"], Tensor]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The losses of one micro-batch that are asked for."""

    batch: Batch
    labels: Tensor
    """[N] int64."""
    terms: Sequence[LmLossTerm]
    names: Sequence[str]
    """Of the terms' losses."""
    extras: Sequence[Mapping[str, Tensor]]
    """What each term prepared, flattened to [N, ...]."""
    output_weight: float | Tensor
    """Of cross-entropy in `total`."""


class LossPath(Protocol):
    """Computes `cross_entropy`, one loss a term, and `total`, which alone carries gradients: fp32 sums."""

    def __call__(self, job: Job) -> dict[str, Tensor] | None:
        """Return the losses; None where the model family turns out to do more than this path knows."""
        ...


def choose_path(
    model: nn.Module, terms: Sequence[LmLossTerm], chunk_tokens: ChunkTokens, *, shares_output: bool
) -> LossPath:
    """Return the path that holds the fewest logits of those that this model and these terms allow.

    Args:
        model: A causal LM, its techniques in place.
        terms: The terms that will be asked for.
        chunk_tokens: Tokens whose logits exist at once, or `auto`.
        shares_output: Whether losses inside the model take a share of the output's weight.
    """
    form = known_head_form(model.config)
    head = _head_of(model)
    one_in_head = (
        not is_split_head(head)
        and len(terms) == 1
        and isinstance(terms[0], HeadLossTerm)
        and form is None
        and not shares_output
    )
    of_tokens = all(isinstance(term, TokenLossTerm) for term in terms)
    if not is_plain_head(head) or not (of_tokens or one_in_head):
        return FromLogits(model, chunk_tokens)
    if form is not None:
        return OnBody(model, chunk_tokens, form)
    return FromLogits(model, chunk_tokens) if head_extras(model.config) else InHead(model, chunk_tokens)


class InHead:
    """Inside the head's call, for a model that leaves its logits alone; whether one does shows in the first call."""

    def __init__(self, model: nn.Module, chunk_tokens: ChunkTokens) -> None:
        self._model, self._chunk = model, _fused_chunk(chunk_tokens)

    def __call__(self, job: Job) -> dict[str, Tensor] | None:
        """See `LossPath`."""
        losses: dict[str, Tensor] = {}
        is_of_head = bool(job.terms) and isinstance(job.terms[0], HeadLossTerm)
        settings = (job, self._chunk, HeadForm(), losses)
        loss = _both_of(*settings) if is_of_head else _token_losses(_head_of(self._model), *settings)
        total = loss_in_head(self._model, model_inputs(self._model, job.batch), job.labels.numel(), loss)
        return None if total is None else losses | {"total": total}


class OnBody:
    """On the body's last hidden states, for a family whose head scales or caps its logits in a known way."""

    def __init__(self, model: nn.Module, chunk_tokens: ChunkTokens, form: HeadForm) -> None:
        self._model, self._chunk, self._form = model, _fused_chunk(chunk_tokens), form

    def __call__(self, job: Job) -> dict[str, Tensor]:
        """See `LossPath`."""
        losses: dict[str, Tensor] = {}
        loss = _token_losses(_head_of(self._model), job, self._chunk, self._form, losses)
        return losses | {"total": loss_on_body(self._model, model_inputs(self._model, job.batch), loss)}


class FromLogits:
    """From logits: whole up to `AUTO_CHUNK_BYTES`, and above in chunks of tokens that backward recomputes.

    Args:
        model: A causal LM.
        chunk_tokens: Tokens whose logits exist at once, or `auto`.
        is_special: Whether the model is known to change its logits after the head, so that they cannot be cut.
    """

    def __init__(self, model: nn.Module, chunk_tokens: ChunkTokens, *, is_special: bool = False) -> None:
        self._model, self._chunk_tokens, self._is_special = model, chunk_tokens, is_special

    def __call__(self, job: Job) -> dict[str, Tensor]:
        """See `LossPath`."""
        return _from_parts(job, lambda compute: self._parts(job, compute))

    def _parts(self, job: Job, compute: _OfLogits) -> list[Tensor]:
        """Return what `compute` makes of logits [n, V], labels [n] and extras, of all tokens or chunk by chunk."""
        chunk = _whole_groups(self.chunk_size(job.labels.numel()), job.terms)
        if chunk >= job.labels.numel():
            logits = self._model(**model_inputs(self._model, job.batch)).logits
            return [compute(logits.flatten(0, 1), job.labels, list(job.extras))]
        return self._in_chunks(job, chunk, compute)

    def chunk_size(self, num_tokens: int) -> int:
        """Return how many of these tokens have logits at once."""
        if self._chunk_tokens != "auto":
            return self._chunk_tokens
        vocab_size: int = self._model.config.vocab_size  # type: ignore[union-attr, assignment]
        if 4 * num_tokens * vocab_size <= AUTO_CHUNK_BYTES or self._cannot_cut:
            return num_tokens
        return max(1, AUTO_CHUNK_BYTES // (4 * vocab_size))

    @property
    def _cannot_cut(self) -> bool:
        return self._is_special or bool(head_extras(self._model.config)) or is_encoder(self._model)

    def _in_chunks(self, job: Job, chunk: int, compute: _OfLogits) -> list[Tensor]:
        if self._cannot_cut:
            raise ConfigError(
                "this model family does more than its head's matmul to make logits, which chunked losses would "
                "leave out; remove train.logits_chunk_tokens"
            )
        body: Any = self._model.base_model
        hidden = body(**model_inputs(self._model, job.batch)).last_hidden_state.flatten(0, 1)
        head: nn.Module = self._model.get_output_embeddings()  # type: ignore[operator]
        parts = []
        for start in range(0, job.labels.numel(), chunk):
            part = slice(start, start + chunk)
            cut: list[Mapping[str, Tensor]] = [{name: e[part] for name, e in extra.items()} for extra in job.extras]

            def of_chunk(rows: Tensor, part: slice = part, cut: list[Mapping[str, Tensor]] = cut) -> Tensor:
                return compute(head(rows), job.labels[part], cut)

            parts.append(recomputed(of_chunk, hidden[part]))
        return parts


def _whole_groups(chunk_tokens: int, terms: Sequence[LmLossTerm]) -> int:
    """Return a number of tokens near `chunk_tokens` that holds whole groups of every term that has some."""
    group = math.lcm(*(term.group_tokens for term in terms if isinstance(term, GroupLossTerm)))
    return max(1, chunk_tokens // group) * group


def losses_of_logits(job: Job, logits: Tensor) -> dict[str, Tensor]:
    """Return the losses of a micro-batch, see `LossPath`, whose model somebody else called.

    Args:
        job: The losses.
        logits: [N, V], of all tokens.
    """
    return _from_parts(job, lambda compute: [compute(logits, job.labels, list(job.extras))])


def _from_parts(job: Job, in_parts: Callable[[_OfLogits], list[Tensor]]) -> dict[str, Tensor]:
    """Return the losses, given what lets a function see the logits of all tokens, whole or chunk by chunk."""
    others = _of_logits(job)
    if any(isinstance(term, TokenLossTerm) for term in job.terms):
        parts = in_parts(lambda logits, labels, extras: _losses_and_sums(logits, labels, extras, others))
        values = _with_token_terms(job, parts, len(others))
    else:
        parts = in_parts(lambda logits, labels, extras: _sums(logits, labels, extras, others))
        values = list(sum(parts[1:], parts[0]))
    # Only `total` is differentiated; the others are there to be read.
    losses = dict(zip(["cross_entropy", *job.names], (value.detach() for value in values), strict=True))
    return losses | {"total": _weighted(job, values)}


def _with_token_terms(job: Job, parts: Sequence[Tensor], num_others: int) -> list[Tensor]:
    """Return cross-entropy and all terms, those of tokens computed from the losses of all."""
    of_tokens = torch.cat([part[: len(part) - num_others] for part in parts])
    sums = iter(torch.stack([part[len(part) - num_others :] for part in parts]).sum(0))
    found = iter(_of_tokens(job, of_tokens))
    terms = [next(found if isinstance(term, TokenLossTerm) else sums) for term in job.terms]
    return [of_tokens.sum(), *terms]


def _head_of(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[no-any-return, operator]


def _fused_chunk(chunk_tokens: ChunkTokens) -> int | None:
    return None if chunk_tokens == "auto" else chunk_tokens


def _cross_entropy(head: nn.Module, job: Job, chunk: int | None, form: HeadForm, losses: dict[str, Tensor]) -> HeadLoss:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = head_cross_entropy(
            head, (hidden, weight, bias), job.labels, reduction="sum", form=form, chunk_tokens=chunk
        ).float()
        losses["cross_entropy"] = found.detach()
        return job.output_weight * found

    return loss


def _token_losses(head: nn.Module, job: Job, chunk: int | None, form: HeadForm, losses: dict[str, Tensor]) -> HeadLoss:
    """Cross-entropy, and terms of the tokens' losses where there are some."""
    if not job.terms:
        return _cross_entropy(head, job, chunk, form, losses)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_tokens = head_cross_entropy(
            head, (hidden, weight, bias), job.labels, reduction="none", form=form, chunk_tokens=chunk
        ).float()
        values = [of_tokens.sum(), *_of_tokens(job, of_tokens)]
        losses.update(zip(["cross_entropy", *job.names], (value.detach() for value in values), strict=True))
        return _weighted(job, values)

    return loss


def _of_tokens(job: Job, losses: Tensor) -> list[Tensor]:
    """Return the terms of the tokens' losses [N], in their order."""
    by_row = losses.view_as(job.batch["labels"])
    return [term.of_token_losses(by_row, job.batch) for term in job.terms if isinstance(term, TokenLossTerm)]


def _weighted(job: Job, values: Sequence[Tensor]) -> Tensor:
    """Return the objective, given cross-entropy and the terms."""
    weights = [job.output_weight, *(term.weight for term in job.terms)]
    return sum((w * value for w, value in zip(weights, values, strict=True)), values[0].new_zeros(()))


def _both_of(job: Job, chunk: int | None, form: HeadForm, losses: dict[str, Tensor]) -> HeadLoss:
    term, weight = job.terms[0], job.output_weight
    assert isinstance(term, HeadLossTerm)
    assert isinstance(weight, float | int)

    def loss(*head: Any) -> Tensor:
        found = term.with_cross_entropy(
            head, job.labels, job.extras[0], cross_entropy_weight=weight, chunk_tokens=chunk
        )
        total, losses["cross_entropy"], losses[job.names[0]] = (value.float() for value in found)
        return total

    return loss


def _of_logits(job: Job) -> list[tuple[int, LossTerm]]:
    """Return the terms that look at logits, behind their places."""
    return [(index, term) for index, term in enumerate(job.terms) if not isinstance(term, TokenLossTerm)]


def _sums(
    logits: Tensor, labels: Tensor, extras: Sequence[Mapping[str, Tensor]], terms: Sequence[tuple[int, LossTerm]]
) -> Tensor:
    cross_entropy = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return torch.stack([cross_entropy, *(term(logits, labels, extras[index]) for index, term in terms)])


def _losses_and_sums(
    logits: Tensor, labels: Tensor, extras: Sequence[Mapping[str, Tensor]], terms: Sequence[tuple[int, LossTerm]]
) -> Tensor:
    """Return the cross-entropy of every token, [N], and behind it the sums of terms."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
    return torch.cat([losses, *(term(logits, labels, extras[index]).reshape(1) for index, term in terms)])
