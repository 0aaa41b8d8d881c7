"""Loss terms and losses inside a model, where somebody else calls it: `model(**batch, labels=...).loss` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.losses import AnyLossTerm, EmbeddingLossTerm, TokenLossTerm
from leanmill.trainer.loss_paths import Job, losses_of_logits
from leanmill.trainer.train_module import distinct_names


class AttachedLosses:
    """Put on a causal LM: keeps each micro-batch in sight from the call of the model to its loss.

    In eval mode the loss is transformers' own. In training it is (cross-entropy + terms) / targets, where targets are
    the `num_items_in_batch` that the caller passes on, else those of the micro-batch.

    Args:
        model: The causal LM.
        terms: Of all techniques.
        ledger: Where losses inside the model are attached.
        cross_entropy_weight: Of next-token cross-entropy.
    """

    def __init__(self, model: Any, terms: Sequence[AnyLossTerm], ledger: Ledger, cross_entropy_weight: float) -> None:
        of_vectors = [term.name for term in terms if isinstance(term, EmbeddingLossTerm)]
        if of_vectors:
            raise ConfigError(
                f"{of_vectors[0]} is a loss of vectors of texts, which this loop does not compute; train with leanmill "
                f"train, or remove it"
            )
        self.terms = tuple(term for term in terms if not isinstance(term, EmbeddingLossTerm))
        self.names, self.ledger = distinct_names(terms), ledger
        self.cross_entropy_weight = cross_entropy_weight
        self.num_micro_batches = 1
        self.loss_scale = 1.0
        """What the caller multiplies the loss with before backward where it passes `num_items_in_batch`: ranks, where
        those are of all ranks and reductions average over them."""
        self.rank, self.world_size = 0, 1
        self.num_seen = 0
        """Micro-batches whose loss was computed here in this step."""
        self.values: dict[str, Tensor] = {}
        """Sums over tokens of this step on this rank, by loss, and of `targets`."""
        self._batch: Batch | None = None
        self._first = 0
        self._plain = model.loss_function
        self._checked_padding = not terms
        model.loss_function = self
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)

    def begin_step(self, first: int, num_micro_batches: int) -> None:
        """Begin to count a step's micro-batches; `first` is the number of the first one in the training."""
        self.num_micro_batches, self.num_seen, self.values = num_micro_batches, 0, {}
        self._first = first

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        """Return the loss; called by the model's own forward. See `transformers.loss.loss_utils.ForCausalLMLoss`."""
        if self._batch is None:
            return self._plain(logits, labels, vocab_size, **options)  # type: ignore[no-any-return]
        batch, flat = self._batch, logits.reshape(-1, logits.shape[-1])
        targets = batch["labels"].reshape(-1).to(flat.device)
        if targets.numel() != flat.shape[0]:
            raise ConfigError(
                "this model cuts its logits before the loss; losses of techniques need those of all tokens"
            )
        job = Job(
            batch=batch,
            labels=targets,
            terms=self.terms,
            names=self.names,
            extras=[{} if isinstance(term, TokenLossTerm) else self._prepared(term, batch) for term in self.terms],
            output_weight=self._output_weight(),
        )
        losses = losses_of_logits(job, flat)
        self.num_seen += 1
        self._note({**losses, "targets": (targets != -100).sum()})
        return losses["total"] / self._num_targets(batch, options.get("num_items_in_batch"))

    def _prepared(self, term: Any, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: value.flatten(0, 1) for name, value in term.prepare(batch).items()}

    def _output_weight(self) -> float | Tensor:
        shared = self.ledger.shares_output
        return self.cross_entropy_weight * self.ledger.output_factor[0] if shared else self.cross_entropy_weight

    def _note(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach()
            self.values[name] = self.values[name] + value if name in self.values else value

    def _num_targets(self, batch: Batch, num_items: Any) -> Tensor:
        device = batch["labels"].device
        if num_items is None:
            return (batch["labels"] != -100).sum().float().clamp(min=1)
        return torch.as_tensor(num_items, device=device, dtype=torch.float32).clamp(min=1)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._batch = None
        if not module.training or given.get("labels") is None:
            return
        batch = self._batch_of(args, given)
        self.ledger.to(batch["labels"].device).train()
        num_items = given.get("num_items_in_batch")
        # Whoever takes the mean of each micro-batch divides by their number, and reductions by that of ranks.
        factor = 1 / self.num_micro_batches if num_items is None else self.loss_scale
        scale = factor / self._num_targets(batch, num_items)
        self.ledger.begin_step(token_scale=scale, num_micro_batches=self.num_micro_batches)
        self._batch = batch
        self.ledger.begin_forward(batch)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._batch is not None:
            self.ledger.end_forward()
        self._batch = None

    def _batch_of(self, args: tuple[Any, ...], given: dict[str, Any]) -> Batch:
        ids = given.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ConfigError("techniques need input_ids; inputs_embeds alone do not say which tokens were read")
        labels = given.get("shift_labels")
        if labels is None:
            labels = F.pad(given["labels"], (0, 1), value=-100)[..., 1:]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        index = (self._first + self.num_seen) * self.world_size + self.rank
        batch = {
            "input_ids": ids,
            "labels": labels.to(ids.device).contiguous(),
            "position_ids": positions.expand_as(ids).contiguous(),
            "row_ids": index * ids.shape[0] + torch.arange(ids.shape[0], device=ids.device),
        }
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._check_padding(mask)
            batch["token_mask"] = mask.bool()
        return batch

    def _check_padding(self, mask: Tensor) -> None:
        """Teachers are asked without an attention mask: rows may be padded at their end, where nothing looks at it."""
        if self._checked_padding:
            return
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ConfigError(f"{self.names[0]} needs rows padded on the right; set tokenizer.padding_side='right'")
        self._checked_padding = True
