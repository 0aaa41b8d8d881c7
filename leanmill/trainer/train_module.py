"""The module that is sharded and differentiated: a causal LM together with its per-token losses.

Losses are computed inside the module's own forward, where a sharding engine has the output head
gathered, so logits can be made for a chunk of tokens at a time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.core.losses import AnyLossTerm, LmLossTerm, TokenLossTerm
from leanmill.parallel.engine import Wanted
from leanmill.trainer.loss_paths import FromLogits, Job, LossPath, choose_path
from leanmill.trainer.losses import model_inputs
from leanmill.trainer.scoring import TokenLosses, next_logits


log = logging.getLogger(__name__)


class TrainModule(nn.Module):
    """Un-normalised training losses of a causal LM.

    How they are computed is chosen once, see `loss_paths.py`: where the head is a plain matmul, cross-entropy
    (alone, or beside one `HeadLossTerm`) in the head's call or place, and otherwise from logits.

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
        loss_terms: Sequence[LmLossTerm] = (),
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
        self._paths: dict[bool, LossPath] = {}
        self._score = TokenLosses(model, None if chunk_tokens == "auto" else chunk_tokens)

    def forward(self, batch: Batch, *, wanted: Wanted = "losses") -> dict[str, Tensor]:
        """Return fp32 sums over tokens with a label: `cross_entropy`, one entry a term (`term_names`), and `total`.

        Args:
            batch: See `leanmill.core.batches.Batch`.
            wanted: What to return instead, see `Wanted`.
        """
        if wanted == "hidden_states":
            body: Any = self.model.base_model
            return {"hidden_states": body(**model_inputs(self.model, batch)).last_hidden_state}
        if wanted == "token_losses":
            return {"cross_entropy": self._score(batch)}
        if wanted == "next_logits":
            return {"logits": next_logits(self.model, batch)}
        if not self.training:
            return self._losses(batch)
        self.ledger.begin_forward(batch)
        losses = self._losses(batch)
        self.ledger.end_forward()
        return losses

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = self.loss_terms if self.training else ()
        job = Job(
            batch=batch,
            labels=batch["labels"].reshape(-1),
            terms=terms,
            names=self.term_names if terms else (),
            extras=[{} if isinstance(term, TokenLossTerm) else _flat(term.prepare(batch)) for term in terms],
            output_weight=self._output_weight(),
        )
        losses = self._path(terms)(job)
        if losses is None:
            # Once: what a family does does not change from batch to batch.
            log.info("this model family changes its logits after the head, so losses are computed from logits")
            self.use_logits()
            if self.training:
                self.ledger.begin_forward(batch)  # a second forward of the batch, and the one that counts
            losses = self._path(terms)(job)
            assert losses is not None
        return losses

    def use_logits(self) -> None:
        """Compute losses from whole logits from here on: for a model that changes them after its head."""
        self._paths = dict.fromkeys((False, True), FromLogits(self.model, self.chunk_tokens, is_special=True))

    def _path(self, terms: Sequence[LmLossTerm]) -> LossPath:
        """With and without terms a path is chosen once, when it is first asked for: adapters may come last."""
        path = self._paths.get(bool(terms))
        if path is None:
            shares_output = self.training and self.ledger.shares_output
            path = choose_path(self.model, terms, self.chunk_tokens, shares_output=shares_output)
            self._paths[bool(terms)] = path
        return path

    def _output_weight(self) -> float | Tensor:
        """What the cross-entropy of the model's output counts in `total`."""
        if not (self.training and self.ledger.shares_output):
            return self.cross_entropy_weight
        return self.cross_entropy_weight * self.ledger.output_factor[0]


def distinct_names(terms: Sequence[AnyLossTerm]) -> tuple[str, ...]:
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
