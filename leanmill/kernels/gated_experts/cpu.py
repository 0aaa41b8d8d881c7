"""Gated experts on the CPU in C: the gate is taken while products are stored.

Forward stores what gate and up came out as, and hidden, in one pass over a block of results that is
still in the cache. Backward turns the gradient of hidden into that of gate and up likewise, and
computes hidden again there, so that it is not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.gated_experts.experts import Experts, Gradients, Needed
from leanmill.kernels.grouped_gemm import cpu
from leanmill.kernels.grouped_gemm import problem as product
from leanmill.kernels.native.large_pages import large_empty
from leanmill.kernels.swiglu import cpu as gate


_GATE, _GATE_BACKWARD = 1, 2
"""GATE and GATE_BACKWARD in cpu.c of the grouped product."""
_MAX_GATE_CHUNK = 256
"""Columns of gate, and as many of up, that a task computes."""


def up(experts: Experts, *, keep: bool) -> tuple[Tensor | None, Tensor]:
    """Return gate and up [N, 2I], or None unless `keep`, and hidden [N, I]."""
    tokens = cpu.Orders(experts.up_problem()).gather_tokens
    kept, hidden, _ = _product(experts, experts.tokens, experts.gate_up, tokens, keep=keep)
    return kept, hidden


def down(experts: Experts, hidden: Tensor) -> Tensor:
    """Return the sum over each token's experts [T, H]."""
    return cpu.forward(experts.down_problem(hidden))


def backward(experts: Experts, gate_up: Tensor, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given gate and up [N, 2I] and that of the result [T, H]."""
    grad_gate_up = grad_weights = grad_down = None
    if needed.tokens or needed.gate_up or needed.weights:
        orders = cpu.Orders(experts.down_problem(gate_up))
        grad_gate_up, hidden, dots = _product(
            experts, grad, experts.down, orders.scatter_tokens, gate_up=gate_up, scale=orders.scale
        )
        if needed.weights:
            by_copy = experts.down_problem(hidden).by_copy(dots.sum(-1))
            grad_weights = by_copy.to(experts.weights.dtype)
    else:
        hidden = gate.swiglu(gate_up)
    if needed.down:
        only_weight = product.Needed(rows=False, weight=True)
        grad_down = cpu.backward(experts.down_problem(hidden), grad, only_weight).weight
    del hidden
    if grad_gate_up is None or not (needed.tokens or needed.gate_up):
        return Gradients(down=grad_down, weights=grad_weights)
    wanted = product.Needed(rows=needed.tokens, weight=needed.gate_up)
    found = cpu.backward(experts.up_problem(), grad_gate_up, wanted)
    return Gradients(found.rows, found.weight, grad_down, grad_weights)


def _product(
    experts: Experts,
    rows: Tensor,
    weight: Tensor,
    row_index: Tensor | None,
    *,
    keep: bool = True,
    gate_up: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Multiply tokens' rows with the weights of gate and up, or with `gate_up` take their gradient.

    Returns:
        Gate and up, or the gradient of both, [N, 2I]; hidden [N, I]; and, of a gradient, the inner products
        of hidden with its gradient before `scale`, [N, chunks] to be summed.
    """
    is_backward = gate_up is not None
    ends: list[int] = experts.offsets.tolist()
    k, n = experts.down.shape[1:]
    # Forward computes both halves of a chunk.
    chunk = min(cpu.chunk_width(n, k), _MAX_GATE_CHUNK if gate_up is None else n)
    num_rows = experts.up_problem().num_rows
    out = large_empty(rows, num_rows, 2 * n) if keep else None
    hidden = large_empty(rows, num_rows, n)
    # Rows past the last expert's belong to nobody, and no task writes them.
    for written in (out, hidden):
        if written is not None:
            written[ends[-1] :].zero_()
    dots = torch.zeros(num_rows if is_backward else 0, -(-n // chunk))
    tasks = cpu.row_tasks(ends, n, chunk)
    table = torch.tensor(tasks, dtype=torch.int64).view(-1, 4)
    arguments = cpu.RowsProblem(
        *map(cpu.address, (rows, weight, out, None, row_index, None, scale, None, None)),
        *map(cpu.address, (dots if is_backward else None, experts.offsets, table, gate_up, hidden)),
        *(len(tasks), len(ends), k, n, chunk, dots.shape[1], int(is_backward)),
        _GATE_BACKWARD if is_backward else _GATE,
    )
    cpu.run("grouped_rows", rows.dtype, arguments, len(tasks), ends[-1] * k * n)
    return out, hidden, dots
