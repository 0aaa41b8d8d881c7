"""The module that is sharded and differentiated: a causal LM together with its per-token losses.

Losses are computed inside the module's own forward, where a sharding engine has the output head
gathered, so logits can be made for a chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.site import recomputed
from leanmill.core.technique import Batch, LossTerm


AUTO_CHUNK_BYTES = 256 * 2**20
"""`auto` keeps all logits of a micro-batch at once up to this size (fp32)."""

_HEAD_EXTRAS = ("logit_scale", "logits_scaling", "final_logit_softcapping", "output_multiplier_scale")


class TrainModule(nn.Module):
    """Un-normalised training losses of a causal LM.

    Args:
        model: The Hugging Face causal LM.
        loss_terms: Techniques' per-token losses; used in training mode only.
        cross_entropy_weight: Weight of next-token cross-entropy in `total`.
        chunk_tokens: Tokens whose logits exist at once, or `auto`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_terms: Sequence[LossTerm] = (),
        cross_entropy_weight: float = 1.0,
        chunk_tokens: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        # A tuple, not a ModuleList: a teacher inside a term is not a part of the student.
        self.loss_terms = tuple(loss_terms)
        self.cross_entropy_weight = cross_entropy_weight
        self.chunk_tokens = chunk_tokens

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return fp32 sums over tokens with a label: `cross_entropy`, one entry a term, and `total`.

        Args:
            batch: See `leanmill.core.technique.Batch`.
        """
        terms = self.loss_terms if self.training else ()
        extras = [_flat(term.prepare(batch)) for term in terms]
        labels = batch["labels"].reshape(-1)
        chunk = self._chunk_size(labels.numel())
        if chunk >= labels.numel():
            logits = self.model(**_inputs(batch)).logits
            sums = self._sums(logits.flatten(0, 1), labels, terms, extras)
        else:
            sums = self._chunked_sums(batch, labels, terms, extras, chunk)
        weights = [self.cross_entropy_weight, *(term.weight for term in terms)]
        losses = {"cross_entropy": sums[0], **{term.name: value for term, value in zip(terms, sums[1:], strict=True)}}
        losses["total"] = sum((w * value for w, value in zip(weights, sums, strict=True)), sums.new_zeros(()))
        return losses

    def _chunk_size(self, num_tokens: int) -> int:
        if self.chunk_tokens != "auto":
            return self.chunk_tokens
        vocab_size: int = self.model.config.vocab_size  # type: ignore[union-attr, assignment]
        if 4 * num_tokens * vocab_size <= AUTO_CHUNK_BYTES or _head_is_special(self.model.config):
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
        if _head_is_special(self.model.config):
            raise ConfigError(
                "this model family scales or caps its logits after the head, which chunked losses would "
                "leave out; remove train.logits_chunk_tokens"
            )
        hidden = self.model.base_model(**_inputs(batch)).last_hidden_state.flatten(0, 1)  # type: ignore[operator, union-attr]
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        sums = hidden.new_zeros(1 + len(terms), dtype=torch.float32)
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            cut = [{name: value[part] for name, value in extra.items()} for extra in extras]

            def chunk_sums(rows: Tensor, part: slice = part, cut: list[dict[str, Tensor]] = cut) -> Tensor:
                return self._sums(head(rows), labels[part], terms, cut)

            sums = sums + recomputed(chunk_sums, hidden[part])
        return sums

    def _sums(
        self, logits: Tensor, labels: Tensor, terms: Sequence[LossTerm], extras: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        cross_entropy = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        others = [term(logits, labels, extra) for term, extra in zip(terms, extras, strict=True)]
        return torch.stack([cross_entropy, *others])


def _inputs(batch: Batch) -> dict[str, Any]:
    # No attention mask: transformers derives the block-diagonal causal mask from positions that
    # restart at each document.
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def _flat(extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flatten(0, 1) for name, value in extras.items()}


def _head_is_special(config: Any) -> bool:
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in _HEAD_EXTRAS)
