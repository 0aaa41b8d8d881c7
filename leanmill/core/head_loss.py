"""Losses computed in the place of an output head's logits.

The head module is called as ever, and hooks that a sharding engine put on it run; what stands around it
takes the hidden states and returns a loss in the place of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from leanmill.core.around import Around, Call, Ring, arounds, put_around
from leanmill.core.operands import recomputed
from leanmill.core.product import compute_dtype
from leanmill.core.site import LinearSite


HeadLoss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""Given hidden states [N, H], the head's weight [V, H] and its bias: a scalar."""


class LossPlace(Around):
    """Innermost around an output head: lets a call compute something else of what the head is given."""

    technique: ClassVar[str] = "losses"
    ring: ClassVar[Ring] = Ring.DECIDE

    def __init__(self) -> None:
        super().__init__()
        self._instead: Callable[[Tensor], Tensor] | None = None

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Return the logits, or what is asked for `instead`."""
        return call(*args, **kwargs) if self._instead is None else self._instead(*args, **kwargs)

    @contextmanager
    def instead(self, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let calls of the head return `compute` of their hidden states; contexts nest."""
        outer, self._instead = self._instead, compute
        try:
            yield
        finally:
            self._instead = outer


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether the head is nothing but a matmul with one weight, staged or not."""
    if isinstance(head, LinearSite) and any(stage.has_backward_weight for stage in head.weight_stages()):
        return False
    if head is None or type(head) not in (nn.Linear, LinearSite) or getattr(head, "split", None) is not None:
        return False
    return all(isinstance(around, LossPlace) for around in arounds(head))


def loss_place(head: nn.Module) -> LossPlace:
    """Return the place for losses in a head that `is_plain_head`, made where there is none yet."""
    found = next((around for around in arounds(head) if isinstance(around, LossPlace)), None)
    if found is None:
        found = LossPlace()
        put_around(head, found)
    return found


def loss_of_head(head: nn.Module, hidden: Tensor, loss: HeadLoss) -> Tensor:
    """Call a head that `is_plain_head` on hidden states [..., H] and return `loss` of what it would multiply."""
    with loss_place(head).instead(lambda hidden: loss(*head_operands(head, hidden))):  # type: ignore[arg-type]
        return head(hidden)  # type: ignore[no-any-return]


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
