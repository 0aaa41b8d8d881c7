"""Losses computed inside the call of a model's output head, so that all its logits never exist.

The head module is called as ever, and hooks that a sharding engine put on it run; only its body is
another for that call: it takes the hidden states and returns a loss in the place of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.head import known_head_form
from leanmill.core.operands import recomputed
from leanmill.core.product import compute_dtype
from leanmill.core.site import LinearSite


HeadLoss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""Given hidden states [N, H], the head's weight [V, H] and its bias: a scalar."""


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a causal LM for a micro-batch."""
    # No attention mask: transformers derives the block-diagonal causal mask from positions that
    # restart at each document.
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether the head is nothing but a matmul with one weight, staged or not."""
    if isinstance(head, LinearSite) and any(stage.has_backward_weight for stage in head.weight_stages()):
        return False
    return type(head) in (nn.Linear, LinearSite) and "forward" not in vars(head)


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

    def body(hidden: Tensor) -> Tensor:
        vocab_size = head.weight.shape[0]
        if hidden.shape[:-1].numel() != num_tokens or found:
            found.append(hidden.new_zeros(()))
        else:
            found.append(loss(*_operands(head, hidden)))
        # In the shape of one token's logits without their memory, so that a family that cuts or
        # scales what it takes for logits shows.
        return found[0].expand(1, 1, vocab_size)

    with _other_body(head, body):
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
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    with _other_body(head, lambda hidden: loss(*_operands(head, hidden))):
        return head(hidden)  # type: ignore[no-any-return]


@contextmanager
def _other_body(module: nn.Module, body: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = body
    try:
        yield
    finally:
        del module.forward


def _operands(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the head's matmul would use: flat, staged, and in autocast's dtype."""
    weight: Tensor = head.weight
    if isinstance(head, LinearSite) and head.is_staged:
        operands = head.operands()
        weight = recomputed(lambda *tensors: operands.bound(tensors).weight(), *operands.tensors)
        hidden = recomputed(lambda rows, *tensors: operands.bound(tensors).tokens(rows), hidden, *operands.tensors)
    bias: Tensor | None = head.bias
    dtype = compute_dtype(hidden)
    return hidden.flatten(0, -2).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
