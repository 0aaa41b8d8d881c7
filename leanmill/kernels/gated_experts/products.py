"""Gated experts as two grouped products with the gate between them, whatever computes those."""

from __future__ import annotations

from torch import Tensor

from leanmill.kernels.gated_experts.experts import Experts, Gradients, Needed
from leanmill.kernels.grouped_gemm import op as grouped
from leanmill.kernels.grouped_gemm import problem as product
from leanmill.kernels.swiglu import op as gate


def up(experts: Experts, *, keep: bool) -> tuple[Tensor | None, Tensor]:
    """Return gate and up [N, 2I], or None unless `keep`, and hidden [N, I]."""
    problem = experts.up_problem()
    gate_up = grouped.path(problem).forward(problem)
    return gate_up if keep else None, gate.path(gate_up).swiglu(gate_up)


def down(experts: Experts, hidden: Tensor) -> Tensor:
    """Return the sum over each token's experts [T, H]."""
    problem = experts.down_problem(hidden)
    return grouped.path(problem).forward(problem)  # type: ignore[no-any-return]


def backward(experts: Experts, gate_up: Tensor, grad: Tensor, needed: Needed) -> Gradients:
    """Return the gradients asked for, given gate and up [N, 2I] and that of the result [T, H]."""
    is_deep = needed.tokens or needed.gate_up
    problem = experts.down_problem(gate.path(gate_up).swiglu(gate_up))
    wanted = product.Needed(rows=is_deep, weight=needed.down, scatter_weights=needed.weights)
    of_down = grouped.path(problem).backward(problem, grad, wanted)
    if not is_deep:
        return Gradients(None, None, of_down.weight, of_down.scatter_weights)
    problem = experts.up_problem()
    wanted = product.Needed(rows=needed.tokens, weight=needed.gate_up)
    grad_gate_up = gate.path(gate_up).backward(gate_up, of_down.rows)
    of_up = grouped.path(problem).backward(problem, grad_gate_up, wanted)
    return Gradients(of_up.rows, of_up.weight, of_down.weight, of_down.scatter_weights)
