"""The module that is sharded and differentiated: a causal LM together with its per-token losses.

Losses are computed inside the module's own forward, where a sharding engine has the output head
gathered, so logits can be made for a chunk of tokens at a time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.head import HeadForm, head_extras, known_head_form
from leanmill.core.head_loss import HeadLoss, is_plain_head
from leanmill.core.ledger import Ledger
from leanmill.core.losses import HeadLossTerm, LossTerm
from leanmill.core.operands import recomputed
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy
from leanmill.trainer.losses import loss_in_head, loss_on_body, model_inputs
from leanmill.trainer.scoring import TokenLosses


log = logging.getLogger(__name__)

AUTO_CHUNK_BYTES = 256 * 2**20
"""Where logits are made at all, `auto` keeps those of a micro-batch at once up to this size (fp32)."""


class TrainModule(nn.Module):
    """Un-normalised training losses of a causal LM.

    Where the head is a plain matmul, cross-entropy (alone, or beside one `HeadLossTerm`) is computed
    inside the head's call: gradients are built with the loss, a chunk of tokens at a time. Terms that
    take logits, adapters around the head and families that treat logits in ways of their own get
    logits, whole up to `AUTO_CHUNK_BYTES` and in chunks that backward recomputes above.

    Args:
        model: The Hugging Face causal LM.
        loss_terms: Techniques' per-token losses; used in training mode only.
        cross_entropy_weight: Weight of next-token cross-entropy in `total`.
        chunk_tokens: Tokens whose logits exist at once, or `auto`.
        ledger: Where losses inside the model are attached; they are no part of `total`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_terms: Sequence[LossTerm] = (),
        cross_entropy_weight: float = 1.0,
        chunk_tokens: int | Literal["auto"] = "auto",
        *,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.ledger = Ledger() if ledger is None else ledger
        # A tuple, not a ModuleList: a teacher inside a term is not a part of the student.
        self.loss_terms = tuple(loss_terms)
        self.term_names = distinct_names(loss_terms)
        self.cross_entropy_weight = cross_entropy_weight
        self.chunk_tokens = chunk_tokens
        self._may_fuse = True
        self._score = TokenLosses(model, self._fused_chunk)

    def forward(self, batch: Batch, *, per_token: bool = False) -> dict[str, Tensor]:
        """Return fp32 sums over tokens with a label: `cross_entropy`, one entry a term (`term_names`), and `total`.

        Args:
            batch: See `leanmill.core.batches.Batch`.
            per_token: Return `cross_entropy` of each token instead, [B, S], alone and unweighted.
        """
        if per_token:
            return {"cross_entropy": self._score(batch)}
        if not self.training:
            return self._losses(batch)
        self.ledger.begin_forward(batch)
        losses = self._losses(batch)
        self.ledger.end_forward()
        return losses

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = self.loss_terms if self.training else ()
        extras = [_flat(term.prepare(batch)) for term in terms]
        labels = batch["labels"].reshape(-1)
        fused = self._fused(batch, labels, terms, extras)
        if fused is not None:
            return fused
        chunk = self._chunk_size(labels.numel())
        if chunk >= labels.numel():
            logits = self.model(**model_inputs(batch)).logits
            sums = self._sums(logits.flatten(0, 1), labels, terms, extras)
        else:
            sums = self._chunked_sums(batch, labels, terms, extras, chunk)
        weights = [self._output_weight(), *(term.weight for term in terms)]
        # Only `total` is differentiated; the others are there to be read.
        names = ["cross_entropy", *(self.term_names if terms else ())]
        losses = dict(zip(names, sums.detach(), strict=True))
        losses["total"] = sum((w * value for w, value in zip(weights, sums, strict=True)), sums.new_zeros(()))
        return losses

    def _fused(
        self, batch: Batch, labels: Tensor, terms: Sequence[LossTerm], extras: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """Return the losses without making all logits, or None where that is not known to be the same."""
        model, head = self.model, self.model.get_output_embeddings()  # type: ignore[operator]
        if not self._may_fuse or not is_plain_head(head):
            return None
        losses: dict[str, Tensor] = {}
        form = known_head_form(model.config)
        if not terms:
            loss = self._cross_entropy_of(labels, form or HeadForm(), losses)
        elif len(terms) == 1 and isinstance(terms[0], HeadLossTerm) and form is None and not self.ledger.shares_output:
            loss = self._both_of(labels, terms[0], extras[0], losses)
        else:
            return None
        if form is not None:
            return losses | {"total": loss_on_body(model, model_inputs(batch), loss)}
        if head_extras(model.config):
            self._may_fuse = False
            return None
        total = loss_in_head(model, model_inputs(batch), labels.numel(), loss)
        if total is None:
            # Once: what a family does does not change from batch to batch.
            self._may_fuse = False
            log.info("this model family changes its logits after the head, so losses are computed from logits")
            return None
        return losses | {"total": total}

    def _cross_entropy_of(self, labels: Tensor, form: HeadForm, losses: dict[str, Tensor]) -> HeadLoss:
        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            found = linear_cross_entropy(
                hidden,
                weight,
                labels,
                bias,
                reduction="sum",
                logit_scale=form.scale,
                softcap=form.softcap,
                chunk_tokens=self._fused_chunk,
            ).float()
            losses["cross_entropy"] = found.detach()
            return self._output_weight() * found

        return loss

    def _both_of(
        self, labels: Tensor, term: HeadLossTerm, extras: Mapping[str, Tensor], losses: dict[str, Tensor]
    ) -> HeadLoss:
        def loss(*head: Any) -> Tensor:
            total, losses["cross_entropy"], losses[self.term_names[0]] = (
                value.float()
                for value in term.with_cross_entropy(
                    head,
                    labels,
                    extras,
                    cross_entropy_weight=self.cross_entropy_weight,
                    chunk_tokens=self._fused_chunk,
                )
            )
            return total

        return loss

    def _output_weight(self) -> float | Tensor:
        """What the cross-entropy of the model's output counts in `total`."""
        if not (self.training and self.ledger.shares_output):
            return self.cross_entropy_weight
        return self.cross_entropy_weight * self.ledger.output_factor[0]

    @property
    def _fused_chunk(self) -> int | None:
        return None if self.chunk_tokens == "auto" else self.chunk_tokens

    def _chunk_size(self, num_tokens: int) -> int:
        if self.chunk_tokens != "auto":
            return self.chunk_tokens
        vocab_size: int = self.model.config.vocab_size  # type: ignore[union-attr, assignment]
        if 4 * num_tokens * vocab_size <= AUTO_CHUNK_BYTES or self._head_is_special():
            return num_tokens
        return max(1, AUTO_CHUNK_BYTES // (4 * vocab_size))

    def _chunked_sums(
        self,
        batch: Batch,
        labels: Tensor,
        terms: Sequence[LossTerm],
        extras: Sequence[Mapping[str, Tensor]],
        chunk: int,
    ) -> Tensor:
        if self._head_is_special():
            raise ConfigError(
                "this model family scales or caps its logits after the head, which chunked losses would "
                "leave out; remove train.logits_chunk_tokens"
            )
        hidden = self.model.base_model(**model_inputs(batch)).last_hidden_state.flatten(0, 1)  # type: ignore[operator, union-attr]
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        sums = hidden.new_zeros(1 + len(terms), dtype=torch.float32)
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            cut = [{name: value[part] for name, value in extra.items()} for extra in extras]

            def chunk_sums(rows: Tensor, part: slice = part, cut: list[dict[str, Tensor]] = cut) -> Tensor:
                return self._sums(head(rows), labels[part], terms, cut)

            sums = sums + recomputed(chunk_sums, hidden[part])
        return sums

    def _head_is_special(self) -> bool:
        return not self._may_fuse or bool(head_extras(self.model.config))

    def _sums(
        self, logits: Tensor, labels: Tensor, terms: Sequence[LossTerm], extras: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        cross_entropy = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        others = [term(logits, labels, extra) for term, extra in zip(terms, extras, strict=True)]
        return torch.stack([cross_entropy, *others])


def distinct_names(terms: Sequence[LossTerm]) -> tuple[str, ...]:
    """Names that losses go by, in the order of the terms: the second `distill` is `distill_2`."""
    names: list[str] = []
    taken = {"cross_entropy", "total"}
    for term in terms:
        numbered = (f"{term.name}_{number}" for number in itertools.count(2))
        name = next(n for n in itertools.chain((term.name,), numbered) if n not in taken)
        taken.add(name)
        names.append(name)
    return tuple(names)


def _flat(extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flatten(0, 1) for name, value in extras.items()}
