"""Row-wise operations on DTensors: each rank works on the rows it holds."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is sharded, without importing torch.distributed for the answer."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def on_local_rows(function: Callable[[Tensor], Tensor], tensor: Tensor, *, num_row_dims: int = 1) -> Tensor:
    """Apply a function that treats rows independently and keeps the shape, differentiably.

    Args:
        function: Works on the last `num_row_dims` dims of whatever leading dims there are.
        tensor: A DTensor [..., rows], or a plain tensor, which is passed on as it is.
        num_row_dims: Trailing dims that must be whole on every rank.

    Raises:
        ValueError: A trailing dim is sharded, or the tensor is a pending sum.
    """
    if not is_dtensor(tensor):
        return function(tensor)
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    whole_from = tensor.dim() - num_row_dims
    for placement in tensor.placements:
        if placement.is_partial() or (isinstance(placement, Shard) and placement.dim % tensor.dim() >= whole_from):
            raise ValueError(
                f"a weight {tuple(tensor.shape)} placed {tensor.placements} does not hold whole rows (last "
                f"{num_row_dims} dims); allowed: Replicate and Shard(d) for d < {whole_from}; "
                f"call weight.redistribute(placements=[Replicate()]) first"
            )
    local = function(tensor.to_local())
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
