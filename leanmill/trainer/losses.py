"""Losses computed inside the call of a model's output head, so that all its logits never exist."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.encoders import encoder_inputs, is_encoder
from leanmill.core.head import known_head_form
from leanmill.core.head_loss import HeadLoss, head_operands, loss_of_head, loss_place


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the arguments of a model for a micro-batch."""
    if is_encoder(model):
        return encoder_inputs(model, batch)
    # No attention mask: transformers derives the block-diagonal causal mask from positions that
    # restart at each document.
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    # Of a row that ranks share, a model sees a part: documents, known from the whole, reach attention as they are.
    return inputs | {name: batch[name] for name in ("document_ids", "document_parts") if name in batch}


def loss_in_head(model: nn.Module, inputs: dict[str, Any], num_tokens: int, loss: HeadLoss) -> Tensor | None:
    """Run the model and return `loss` of what its head was given, or None if the family does more.

    Args:
        model: A causal LM whose head `is_plain_head`.
        inputs: Arguments of the model.
        num_tokens: Hidden states that the head should get.
        loss: Computed in place of the logits.

    Returns:
        A scalar. None if logits are scaled, capped, cut or made in several calls.
    """
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    found: list[Tensor] = []

    def in_its_place(hidden: Tensor) -> Tensor:
        vocab_size = head.weight.shape[0]
        if hidden.shape[:-1].numel() != num_tokens or found:
            found.append(hidden.new_zeros(()))
        else:
            found.append(loss(*head_operands(head, hidden)))
        # In the shape of one token's logits without their memory, so that a family that cuts or
        # scales what it takes for logits shows.
        return found[0].expand(1, 1, vocab_size)

    with loss_place(head).instead(in_its_place):
        logits: Tensor = model(**inputs).logits
    is_untouched = len(found) == 1 and logits.data_ptr() == found[0].data_ptr() and logits.stride()[-1:] == (0,)
    if not is_untouched or logits.shape != (1, 1, head.weight.shape[0]):
        return None
    # What came out of the model rather than `found`: hooks may have wrapped it for backward. A copy,
    # because an in-place operation on a view would lose the hooks that FSDP puts on what it gets.
    return logits[0, 0, 0].clone()


def loss_on_body(model: nn.Module, inputs: dict[str, Any], loss: HeadLoss) -> Tensor:
    """Return `loss` of the body's last hidden state, for a family with a `known_head_form`.

    Args:
        model: A causal LM whose head `is_plain_head`.
        inputs: Arguments of the model.
        loss: Applies the known form itself.
    """
    assert known_head_form(model.config) is not None
    hidden = model.base_model(**inputs).last_hidden_state  # type: ignore[operator, union-attr]
    return loss_of_head(model.get_output_embeddings(), hidden, loss)  # type: ignore[operator]
