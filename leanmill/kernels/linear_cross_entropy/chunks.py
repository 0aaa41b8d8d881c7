"""A linear head a chunk of tokens at a time: logits are made, turned into their own gradient, and used.

Gradients of hidden states and weight are complete when the loss is, so backward only scales them and
no logits are made twice: three matmuls, as for the whole [tokens, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
_LEAST_ROWS = {"cpu": 256, "cuda": 1024}
"""Fewer rows a matmul leave the machine waiting for the weight."""
_PRODUCT_BYTES = 32 * 2**20
"""Size of the low-precision products that are added to an fp32 sum one after the other."""

RowLoss = Callable[[Tensor, slice], Tensor]
"""Given a chunk of logits [n, V] and which rows they are: return losses [n] and leave the gradient
of their sum in the logits."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Results:
    """Losses [N] and the gradients of their sum; a gradient not wanted is None."""

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    """At least fp32."""
    bias: Tensor | None
    """At least fp32."""


def rows_a_chunk(hidden: Tensor, weight: Tensor, chunk_rows: int | None, *, logits_alive: int = 1) -> int:
    """Return how many rows to take at once: what fits a chunk's bytes, but enough for a good matmul.

    Args:
        hidden: [N, H].
        weight: [V, H].
        chunk_rows: The caller's wish.
        logits_alive: Tensors [rows, V] that exist at once.
    """
    if chunk_rows is not None:
        return chunk_rows
    kind = "cpu" if hidden.device.type == "cpu" else "cuda"
    fitting = _CHUNK_BYTES[kind] // max(1, weight.shape[0] * hidden.element_size() * logits_alive)
    return max(_LEAST_ROWS[kind], fitting // 64 * 64)


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, row_loss: RowLoss, wanted: Wanted, chunk_rows: int
) -> Results:
    """Apply `row_loss` to the logits of all rows, `chunk_rows` at a time.

    Args:
        hidden: [N, H].
        weight: [V, H].
        bias: [V], if the head has one.
        row_loss: Loss and gradient of a chunk of logits.
        wanted: Which gradients to build.
        chunk_rows: Rows of logits that exist at once.
    """
    num_rows, exact = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(num_rows, dtype=exact)
    of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted.hidden else None
    of_weight = hidden.new_empty(weight.shape, dtype=exact) if wanted.weight else None
    of_bias = hidden.new_zeros(weight.shape[0], dtype=exact) if wanted.bias else None
    if of_weight is not None and num_rows == 0:
        of_weight.zero_()
    space = hidden.new_empty(min(chunk_rows, num_rows), weight.shape[0])
    # Whatever the caller runs under, the operands' own dtype is the one computed in.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            logits = space[: rows.stop - rows.start]
            torch.mm(hidden[rows], weight.t(), out=logits)
            if bias is not None:
                logits.add_(bias)
            losses[rows] = row_loss(logits, rows)
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[rows])
            if of_weight is not None:
                _add_product(of_weight, logits, hidden[rows], is_first=start == 0)
            if of_bias is not None:
                of_bias.add_(logits.sum(0, dtype=exact))
    return Results(losses, of_hidden, of_weight, of_bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Add left^T right to `total`, or write it there if that holds nothing yet."""
    if total.dtype == left.dtype:
        torch.addmm(total, left.t(), right, beta=0 if is_first else 1, out=total)
        return
    step = max(64, _PRODUCT_BYTES // (4 * right.shape[1]))
    for start in range(0, len(total), step):
        columns = slice(start, start + step)
        if left.device.type == "cuda":
            product = torch.mm(left[:, columns].t(), right, out_dtype=total.dtype)
        else:
            product = torch.mm(left[:, columns].t(), right)
        if is_first:
            total[columns] = product
        else:
            total[columns] += product
