"""Gated experts in plain tensor code, differentiable by autograd: the definition."""

from __future__ import annotations

from torch import Tensor

from leanmill.kernels.grouped_gemm import naive as product
from leanmill.kernels.swiglu import naive as gate


def gated_experts(
    tokens: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    positions: Tensor,
    weights: Tensor,
    num_rows: int | None = None,
) -> Tensor:
    """Return what `op.gated_experts` does."""
    up = product.grouped_gemm(tokens, gate_up, offsets, gather_index=positions, num_rows=num_rows)
    return product.grouped_gemm(
        gate.swiglu(up), down, offsets, scatter_index=positions, scatter_weights=weights, num_rows=num_rows
    )
