"""Matmuls with a weight that the ranks of a tensor-parallel group share, as a site sees them.

A rank multiplies with some of the weight's rows (`by_rows`: some of the outputs) or with some of its columns
(some of the inputs; what ranks get is added up). Everything that crosses between ranks happens inside the
site's own call, so that what a site is given and returns is either whole and equal on all ranks, with a
gradient that is so too, or a rank's own part: whoever stands beside it (an adapter, a loss) need not know more.

Stages see the whole weight and whole activations, gathered for as long as they run. What they compute is then
what one process computes, scales and masks and noise included, whatever they reduce over, and the gradients of
their own parameters are whole and equal on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.operands import Operands, recomputed
from leanmill.core.product import linear


class WeightSplit(ABC):
    """Which part of a weight `[out, in]` is here, and the exchanges between the ranks that share it.

    Args:
        by_rows: Whether ranks have rows of the weight, hence parts of the outputs; else columns.
        gathers_output: With rows: return all outputs instead of this rank's.
        splits_input: With columns: take all inputs instead of this rank's.
    """

    def __init__(self, *, by_rows: bool, gathers_output: bool = False, splits_input: bool = False) -> None:
        self.by_rows, self.gathers_output, self.splits_input = by_rows, gathers_output, splits_input

    @property
    def dim(self) -> int:
        """Of the weight, along which it is split."""
        return 0 if self.by_rows else 1

    @property
    @abstractmethod
    def rank(self) -> int:
        """Which of the parts is here."""

    @abstractmethod
    def enter(self, tensor: Tensor) -> Tensor:
        """Return a tensor that all ranks have, as it is; its gradient is the sum of what they give."""

    @abstractmethod
    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of what ranks give; the gradient, equal on all, is passed on as it is."""

    @abstractmethod
    def whole(self, part: Tensor, dim: int) -> Tensor:
        """Return all parts along `dim`; the gradient, equal on all ranks, is cut to this rank's part."""

    @abstractmethod
    def part(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's part along `dim` of what all ranks have; its gradient is gathered from them."""

    def held(self, tensor: Tensor) -> Tensor:
        """Return what this rank multiplies with of a weight or bias as it holds it: all."""
        return tensor

    @abstractmethod
    def largest(self, tensor: Tensor) -> Tensor:
        """Return the element-wise maximum over ranks, without a gradient."""


def split_linear(split: WeightSplit, tokens: Tensor, operands: Operands, bias: Tensor | None) -> Tensor:
    """Apply the staged weight, of which a part is here, to the staged tokens.

    Args:
        split: How ranks share the weight.
        tokens: [..., in], or [..., part of in] where ranks have columns and do not split the input.
        operands: With this rank's part of the weight.
        bias: [out], or this rank's part of it where ranks have rows; or None.

    Returns:
        [..., out], or [..., part of out] where ranks have rows and do not gather the output.
    """
    own_bias = split.held(bias) if split.by_rows and bias is not None else None
    if operands.is_plain:
        product = F.linear(_own_inputs(split, tokens), split.held(operands.tensors[0]), own_bias)
    else:

        def staged(tokens: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            return _staged_product(split, operands, tokens, bias, tensors)

        product = recomputed(staged, tokens, own_bias, *operands.tensors)
    if split.by_rows:
        return split.whole(product, -1) if split.gathers_output else product
    total = split.total(product)
    return total if bias is None else total + bias.to(total.dtype)


def staged_part(split: WeightSplit, operands: Operands, tensors: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of the staged weight, given `operands.tensors`."""
    if len(operands.stages) == 0:
        return tensors[0]
    whole = split.whole(tensors[0], split.dim)
    return split.part(operands.bound((whole, *tensors[1:])).weight(), split.dim)


def split_lookup(split: WeightSplit, ids: Tensor, rows: Tensor, padding_idx: int | None) -> Tensor:
    """Look ids up in a table of which some rows are here; what ranks find is added up.

    Args:
        split: By rows.
        ids: [...] int64, of the whole table.
        rows: [n, H].
        padding_idx: Row without a gradient, in the whole table.
    """
    first, num_rows = split.rank * rows.shape[0], rows.shape[0]
    own = ids - first
    is_here = (own >= 0) & (own < num_rows)
    is_padding_here = padding_idx is not None and first <= padding_idx < first + num_rows
    found = F.embedding(own.where(is_here, 0), rows, padding_idx - first if is_padding_here else None)  # type: ignore[operator]
    return split.total(found.where(is_here.unsqueeze(-1), 0.0))


def _own_inputs(split: WeightSplit, tokens: Tensor) -> Tensor:
    if split.by_rows:
        return split.enter(tokens)
    return split.part(tokens, -1) if split.splits_input else tokens


def _staged_product(
    split: WeightSplit, operands: Operands, tokens: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]
) -> Tensor:
    has_stages = len(operands.stages) > 0
    whole = split.whole(tensors[0], split.dim) if has_stages else split.held(tensors[0])
    bound = operands.bound((whole, *tensors[1:]))
    weight, other = bound.weight(), bound.backward_weight()
    if has_stages:
        weight = split.part(weight, split.dim)
        other = None if other is None else split.part(other, split.dim)
    if len(operands.inputs) > 0:
        if not split.by_rows and not split.splits_input:
            tokens = split.whole(tokens, -1)
        tokens = bound.tokens(tokens)
        tokens = split.enter(tokens) if split.by_rows else split.part(tokens, -1)
    else:
        tokens = _own_inputs(split, tokens)
    return linear(tokens, weight, other, bias)
