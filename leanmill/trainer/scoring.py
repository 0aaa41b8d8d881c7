"""What a causal LM says of tokens, without gradients: the loss of each, for rules that choose among them; the next."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.adapters import adapters_off
from leanmill.core.batches import Batch
from leanmill.core.head import head_extras, known_head_form
from leanmill.core.head_loss import head_cross_entropy, is_plain_head
from leanmill.parallel.engine import Engine
from leanmill.trainer.losses import loss_in_head, loss_on_body, model_inputs


class TokenLosses:
    """Scores micro-batches with one model, without gradients.

    A plain head never holds all logits (`linear_cross_entropy`); adapters around the head, and
    families that treat logits in ways of their own, hold those of the micro-batch.

    Args:
        model: A causal LM. It is called as a whole, so that a sharding engine gathers what it must.
        chunk_tokens: Tokens whose logits a plain head may hold at once; None chooses by memory.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int | None = None) -> None:
        self._model, self._chunk_tokens = model, chunk_tokens
        self._may_fuse = True

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return the losses [B, S], fp32, 0 where there is no label."""
        losses = self._in_head(batch) if self._may_fuse else None
        if losses is None:
            # What a family does to its logits does not change from batch to batch.
            self._may_fuse = False
            losses = self._from_logits(batch)
        return losses.view_as(batch["labels"])

    def _in_head(self, batch: Batch) -> Tensor | None:
        """Return the losses [N] computed in the head's place, or None where that is not known to be the same."""
        config, form = self._model.config, known_head_form(self._model.config)
        if not is_plain_head(self._model.get_output_embeddings()) or (form is None and head_extras(config)):  # type: ignore[operator]
            return None
        labels, found = batch["labels"].reshape(-1), []

        def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            head: nn.Module = self._model.get_output_embeddings()  # type: ignore[operator]
            found.append(
                head_cross_entropy(
                    head,
                    (hidden, weight, bias),
                    labels,
                    reduction="none",
                    form=form,
                    chunk_tokens=self._chunk_tokens,
                )
            )
            return hidden.new_zeros(())

        if form is not None:
            loss_on_body(self._model, model_inputs(self._model, batch), losses)
        elif loss_in_head(self._model, model_inputs(self._model, batch), labels.numel(), losses) is None:
            return None
        return found[0].float()

    def _from_logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self._model(**model_inputs(self._model, batch)).logits
        # Row by row: their fp32 copy would be larger than they are.
        rows = [
            F.cross_entropy(row.float(), labels, ignore_index=-100, reduction="none")
            for row, labels in zip(logits, batch["labels"], strict=True)
        ]
        return torch.stack(rows)


def next_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [B, V] of the tokens that follow the positions `batch["last"]`, whatever stands there."""
    rows, last = torch.arange(len(batch["last"]), device=batch["last"].device), batch["last"]
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        logits: Tensor = model(**model_inputs(model, batch), logits_to_keep=last).logits
        return logits[rows, rows]
    logits = model(**model_inputs(model, batch)).logits
    return logits[rows, last]


class Scores:
    """What a batch rule is offered as `Score`: the engine's model in training, or a frozen one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._frozen: dict[nn.Module, TokenLosses] = {}

    def __call__(self, batch: Batch, model: nn.Module | None = None, *, adapters: bool = True) -> Tensor:
        """See `Score`."""
        if model is None:
            with nullcontext() if adapters else adapters_off(self._engine.module):
                return self._engine.evaluate(batch, wanted="token_losses")["cross_entropy"]
        if model not in self._frozen:
            self._frozen[model] = TokenLosses(model)
        return self._frozen[model](batch)

    def next_logits(self, batch: Batch) -> Tensor:
        """See `Score`."""
        return self._engine.evaluate(batch, wanted="next_logits")["logits"]
