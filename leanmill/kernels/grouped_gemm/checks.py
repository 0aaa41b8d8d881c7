"""Operands of a grouped product that do not fit are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.grouped_gemm.problem import Problem
from leanmill.kernels.native.dtypes import SUFFIXES
from leanmill.kernels.sharded import is_dtensor


DTYPES = (*SUFFIXES, torch.float64)


def checked(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    scatter_weights: Tensor | None,
    num_rows: int | None,
) -> Tensor:
    """Raise on operands that do not fit; return the offsets as int64."""
    tensors = {"rows": rows, "weight": weight, "offsets": offsets}
    optional = {"gather_index": gather_index, "scatter_index": scatter_index, "scatter_weights": scatter_weights}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    shapes = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise ValueError(
                f"{name} is a DTensor, and either rows is not, or an index moves rows across the ends of shards; pass "
                f"{name}.to_local() with offsets of those rows, and for all experts, with gradients summed, "
                f"weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)"
            )
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device} and rows on {rows.device}; move them to one device")
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[-1] != weight.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{shapes} do not fit: rows must be [N, in] and weight [E, out, in] with E >= 1")
    if rows.dtype != weight.dtype or rows.dtype not in DTYPES:
        raise ValueError(f"{shapes}: rows and weight must have one dtype of {', '.join(map(str, DTYPES))}")
    if offsets.shape != weight.shape[:1] or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{shapes}: offsets must be int32 or int64 [{weight.shape[0]}], the end row of each expert")
    for name, index in (("gather_index", gather_index), ("scatter_index", scatter_index)):
        if index is not None and (index.dim() != 2 or index.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{shapes}: {name} must be int64 [T, K], the sorted row of each token's copies")
    if gather_index is not None and gather_index.shape[0] != rows.shape[0]:
        raise ValueError(f"{shapes}: with gather_index {tuple(gather_index.shape)}, rows must have as many tokens")
    _check_num_rows(shapes, rows, gather_index, scatter_index, num_rows)
    if scatter_weights is not None and (scatter_index is None or scatter_weights.shape != scatter_index.shape):
        raise ValueError(f"{shapes}: scatter_weights must have the shape of a scatter_index given with them")
    return offsets.to(torch.int64)


def _check_num_rows(
    shapes: str, rows: Tensor, gather_index: Tensor | None, scatter_index: Tensor | None, num_rows: int | None
) -> None:
    if num_rows is not None and gather_index is None and num_rows != rows.shape[0]:
        raise ValueError(f"{shapes}: num_rows is {num_rows}; without gather_index it is that of rows, or None")
    if num_rows is not None and gather_index is not None and not 0 <= num_rows <= gather_index.numel():
        raise ValueError(
            f"{shapes}: num_rows is {num_rows}; it must be 0 to the {gather_index.numel()} of gather_index"
        )
    found = rows.shape[0] if gather_index is None else gather_index.numel()
    if scatter_index is None or scatter_index.numel() == found:
        return
    if num_rows is None or scatter_index.numel() < num_rows or gather_index is not None:
        raise ValueError(f"{shapes}: scatter_index must have one entry for each of the {found} sorted rows")


def check_offsets(problem: Problem) -> None:
    """Refuse offsets that point outside, where reading them does not stop a GPU.

    Raises:
        ValueError: See above.
    """
    if problem.rows.device.type == "cpu":
        ends = problem.offsets.tolist()
        if any(a > b for a, b in zip([0, *ends], [*ends, problem.num_rows], strict=True)):
            raise ValueError(f"offsets {ends} must ascend from 0 to at most {problem.num_rows}, the number of rows")
