"""Losses computed in the place of an output head's logits.

The head module is called as ever, and hooks that a sharding engine put on it run; what stands around it
takes the hidden states and returns a loss in the place of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from leanmill.core.around import Around, Call, Ring, arounds, put_around
from leanmill.core.expert_shards import part_here
from leanmill.core.head import HeadForm
from leanmill.core.operands import recomputed
from leanmill.core.product import compute_dtype
from leanmill.core.site import LinearSite
from leanmill.core.weight_split import WeightSplit, staged_part
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy
from leanmill.kernels.linear_cross_entropy.split import split_linear_cross_entropy


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
    if head is None or type(head) not in (nn.Linear, LinearSite):
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


def is_split_head(head: nn.Module | None) -> bool:
    """Whether ranks share the head's vocabulary."""
    return isinstance(head, LinearSite) and head.split is not None


def head_cross_entropy(
    head: nn.Module,
    operands: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    *,
    reduction: Literal["sum", "none"],
    form: HeadForm | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of what `head_operands` returned, whoever shares the vocabulary.

    Args:
        head: One that `is_plain_head`.
        operands: Its own.
        labels: [N] int64, -100 where there is none.
        reduction: See `linear_cross_entropy`.
        form: What follows the head; None for nothing.
        chunk_tokens: Tokens whose logits exist at once; None chooses by memory.
    """
    hidden, weight, bias = operands
    form = form or HeadForm()
    options: dict[str, Any] = {"logit_scale": form.scale, "softcap": form.softcap, "chunk_tokens": chunk_tokens}
    split = head.split if isinstance(head, LinearSite) else None
    if split is None:
        return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, **options)
    first_row = split.rank * weight.shape[0]
    losses = split_linear_cross_entropy(
        hidden, weight, labels, bias, first_row=first_row, total=split.total, largest=split.largest, **options
    )
    return losses.sum() if reduction == "sum" else losses


def head_operands(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the head's matmul would use: flat, staged, and in autocast's dtype."""
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if isinstance(head, LinearSite) and head.split is not None:
        hidden, weight = _split_operands(head, head.split, hidden)
        bias = None if bias is None else part_here(bias)
    elif isinstance(head, LinearSite) and head.is_staged:
        operands = head.operands()
        weight = recomputed(lambda *tensors: operands.bound(tensors).weight(), *operands.tensors)
        hidden = recomputed(lambda rows, *tensors: operands.bound(tensors).tokens(rows), hidden, *operands.tensors)
    dtype = compute_dtype(hidden)
    return hidden.flatten(0, -2).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _split_operands(head: LinearSite, split: WeightSplit, hidden: Tensor) -> tuple[Tensor, Tensor]:
    operands = head.operands()
    weight = operands.tensors[0]
    if len(operands.stages) > 0:
        weight = recomputed(lambda *tensors: staged_part(split, operands, tensors), *operands.tensors)
    if len(operands.inputs) > 0:
        hidden = recomputed(lambda rows, *tensors: operands.bound(tensors).tokens(rows), hidden, *operands.tensors)
    return split.enter(hidden), weight
