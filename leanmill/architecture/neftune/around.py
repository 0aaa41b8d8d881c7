"""Noise around a model's table of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.around import Around, Call, Ring, put_around
from leanmill.core.batches import Batch
from leanmill.core.errors import RunError
from leanmill.core.noise import FreshNoise, Noise, uniform
from leanmill.core.rules import StepRule
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext


_TECHNIQUE = "neftune"


class NoisyEmbeddings(Around):
    """Adds noise of [-alpha, alpha) / sqrt(L d) to what a table of embeddings returns, in training.

    L is the length of the document that a token is of: rows hold several, whose positions each begin at 0, and the
    paper's batches hold one a row. A number depends on seed, step, row of the data and place in it only.

    Args:
        alpha: Above 0.
    """

    technique: ClassVar[str] = _TECHNIQUE
    ring: ClassVar[Ring] = Ring.SCALE

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha, self.noise = alpha, Noise(_TECHNIQUE)
        self._batch: Batch | None = None

    def see(self, batch: Batch) -> None:
        """Take the micro-batch of the next forward in training."""
        self._batch = batch

    def forward(self, call: Call, /, *args: object, **kwargs: object) -> Tensor:
        """Return the embeddings [B, S, d] with noise, drawn in fp32 and rounded to their dtype."""
        found: Tensor = call(*args, **kwargs)
        return found + self._drawn(found).to(found.dtype) if self.training else found

    def _drawn(self, found: Tensor) -> Tensor:
        batch = self._batch
        if batch is None or "row_ids" not in batch or found.shape[:2] != batch["position_ids"].shape:
            raise RunError("neftune draws by row of the data, and was not told which rows a batch has")
        num_rows, length, size = found.shape
        place = torch.arange(length * size, device=found.device)
        indices = (batch["row_ids"].unsqueeze(-1) * len(place) + place).view(num_rows, length, size)
        scale = self.alpha * (size * document_lengths(batch["position_ids"])).float().rsqrt()
        return (2 * uniform(self.noise.key, indices) - 1) * scale.unsqueeze(-1)


def document_lengths(position_ids: Tensor) -> Tensor:
    """Return for each token the length of its document, of positions [B, S] that begin at 0 in each; int64 [B, S]."""
    number = (position_ids == 0).cumsum(-1) - (position_ids[:, :1] == 0).long()
    counts = torch.zeros_like(number).scatter_add_(-1, number, torch.ones_like(number))
    return counts.gather(-1, number)


def install(sites: Sites, context: InstallContext, *, alpha: float) -> Sequence[StepRule]:
    """Put noise around the embeddings; return the rules that renew it."""
    noisy = NoisyEmbeddings(alpha)
    put_around(sites.model.get_input_embeddings(), noisy)  # type: ignore[operator]
    context.ledger.before_forward(noisy.see)
    return [FreshNoise(sites.model, context.seed, _TECHNIQUE)]
