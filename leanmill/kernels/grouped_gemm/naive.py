"""The grouped product in plain tensor code, differentiable by autograd: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.moe_permute import naive as permute


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    gather_index: Tensor | None = None,
    scatter_index: Tensor | None = None,
    scatter_weights: Tensor | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """Return what `op.grouped_gemm` does, one expert after the other."""
    if gather_index is not None:
        rows = permute.spread(rows, gather_index, num_rows=num_rows)
    ends = offsets.tolist()
    # Unbound once: each backward of `weight[e]` would fill a gradient of all experts.
    pieces = [F.linear(rows[s:e], w) for s, e, w in zip([0, *ends[:-1]], ends, weight.unbind(0), strict=True)]
    product = torch.cat([*pieces, rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[1])])
    return product if scatter_index is None else permute.combine(product, scatter_index, scatter_weights)
