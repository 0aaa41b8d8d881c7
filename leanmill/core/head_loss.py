"""Losses computed in the place of an output head's logits.

The head module is called as ever, and hooks that a sharding engine put on it run; only its body is
another for that call: it takes the hidden states and returns a loss in the place of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from leanmill.core.operands import recomputed
from leanmill.core.product import compute_dtype
from leanmill.core.site import LinearSite


HeadLoss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""Given hidden states [N, H], the head's weight [V, H] and its bias: a scalar."""


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether the head is nothing but a matmul with one weight, staged or not."""
    if isinstance(head, LinearSite) and any(stage.has_backward_weight for stage in head.weight_stages()):
        return False
    return type(head) in (nn.Linear, LinearSite) and "forward" not in vars(head)


def loss_of_head(head: nn.Module, hidden: Tensor, loss: HeadLoss) -> Tensor:
    """Call a head that `is_plain_head` on hidden states [..., H] and return `loss` of what it would multiply."""
    with other_body(head, lambda hidden: loss(*head_operands(head, hidden))):  # type: ignore[arg-type]
        return head(hidden)  # type: ignore[no-any-return]


@contextmanager
def other_body(module: nn.Module, body: Callable[..., Tensor]) -> Iterator[None]:
    """Let calls of `module` run `body`, inside its hooks; contexts nest."""
    outer = vars(module).get("forward")
    module.forward = body
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


def head_operands(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the head's matmul would use: flat, staged, and in autocast's dtype."""
    weight: Tensor = head.weight
    if isinstance(head, LinearSite) and head.is_staged:
        operands = head.operands()
        weight = recomputed(lambda *tensors: operands.bound(tensors).weight(), *operands.tensors)
        hidden = recomputed(lambda rows, *tensors: operands.bound(tensors).tokens(rows), hidden, *operands.tensors)
    bias: Tensor | None = head.bias
    dtype = compute_dtype(hidden)
    return hidden.flatten(0, -2).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
