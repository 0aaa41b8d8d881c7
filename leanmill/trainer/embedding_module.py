"""The module that is sharded and differentiated where the model's output is one vector for a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.encoders import embedding_inputs
from leanmill.core.ledger import Ledger
from leanmill.core.losses import EmbeddingLossTerm
from leanmill.core.pooling import Pooling
from leanmill.parallel.engine import Wanted
from leanmill.trainer.train_module import distinct_names


class EmbeddingModule(nn.Module):
    """Un-normalised training losses of an encoder, sums over rows of sentence pairs; a *train module*.

    Args:
        model: An encoder without a head.
        pooling: Makes vectors of its hidden states.
        loss_terms: Techniques' losses; used in training mode only.
        ledger: Where losses inside the model are attached; they are no part of `total`.
    """

    def __init__(
        self,
        model: nn.Module,
        pooling: Pooling,
        loss_terms: Sequence[EmbeddingLossTerm] = (),
        *,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.ledger = Ledger() if ledger is None else ledger
        self.loss_terms, self.term_names = tuple(loss_terms), distinct_names(loss_terms)

    def forward(self, batch: Batch, *, wanted: Wanted = "losses") -> dict[str, Tensor]:
        """Return fp32 sums over rows: one entry a term, and `total`; or `embeddings` [B, texts, H] alone.

        Args:
            batch: Rows of sentence pairs, see `leanmill.data.sentence_rows`.
            wanted: `losses` or `embeddings`.
        """
        if wanted == "embeddings":
            return {"embeddings": self._embeddings(batch)}
        if wanted != "losses":
            raise NotImplementedError(f"an encoder of texts has no {wanted}")
        if self.training:
            self.ledger.begin_forward(batch)
        embeddings = self._embeddings(batch)
        # What the ledger attaches inside the model needs a total that depends on it.
        total, losses = (embeddings * 0.0).sum(), dict[str, Tensor]()
        for name, term in zip(self.term_names, self.loss_terms if self.training else (), strict=False):
            value = term.of_embeddings(embeddings, batch)
            losses[name], total = value.detach(), total + term.weight * value
        if self.training:
            self.ledger.end_forward()
        return losses | {"total": total}

    def _embeddings(self, batch: Batch) -> Tensor:
        inputs, is_token = embedding_inputs(self.model, batch)
        found = self.pooling(self.model(**inputs).last_hidden_state, is_token)
        return found.view(*batch["text_lengths"].shape, -1)
