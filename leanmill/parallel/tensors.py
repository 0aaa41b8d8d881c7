"""Sharded and plain tensors alike: gather, assign, norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of `tensor` on every rank. A collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_part(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add this rank's part of a gradient to that of `parameter`, which may be sharded."""
    if not isinstance(parameter, DTensor):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    elif parameter.grad is not None:
        local(parameter.grad).add_(gradient)
    else:
        where = parameter.device_mesh, parameter.placements
        parameter.grad = DTensor.from_local(  # type: ignore[assignment]
            gradient, *where, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write `value` into `target` in place, whichever of the two is sharded.

    A full plain value for a sharded target must be equal on all ranks; each keeps its share.

    Raises:
        ValueError: The shapes differ.
    """
    if target.shape != value.shape:
        raise ValueError(f"shape {tuple(value.shape)} for a tensor of shape {tuple(target.shape)}")
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        _local_write(target, value)
        return
    if isinstance(value, DTensor) and not isinstance(target, DTensor):
        value = value.full_tensor()
    if isinstance(target, DTensor) and isinstance(value, DTensor):
        if value.device_mesh != target.device_mesh or value.placements != target.placements:
            _local_write(target, value.full_tensor())
            return
        target, value = target.to_local(), value.to_local()
    if target.data_ptr() != value.data_ptr() or target.numel() == 0:
        target.copy_(value)


@torch.no_grad()
def write_part(target: DTensor, write: Callable[[Tensor, Sequence[int]], object]) -> None:
    """Have `write(part, offsets)` fill this rank's part of `target`, which begins there in the whole."""
    _, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    inside = [min(offset, whole) for offset, whole in zip(offsets, target.shape, strict=True)]
    write(target.to_local(), inside)


def _local_write(target: DTensor, whole: Tensor) -> None:
    """Write the box of `whole` that lies on this rank."""

    def write(part: Tensor, offsets: Sequence[int]) -> None:
        box = whole
        for dim, (offset, size) in enumerate(zip(offsets, part.shape, strict=True)):
            box = box.narrow(dim, offset, size)
        part.copy_(box)

    write_part(target, write)


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm over all `tensors` as if they were whole, fp32 scalar on `device`, without a host sync."""
    return squared_norm(tensors, device).sqrt().float()


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares over all `tensors` as if they were whole, scalar on `device` in their precision, fp32 at least.

    Tensors are grouped by the mesh dims they are sharded over, since tensors of different meshes
    cannot be stacked; a group's sum of squares is reduced over those dims, then groups are added.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[_sharding(tensor)].append(local(tensor))
    total = torch.zeros((), device=device)
    for sharding, members in groups.items():
        squared = torch.nn.utils.get_total_norm(members).square()
        if sharding is not None:
            mesh, dims = sharding
            for dim in dims:
                dist.all_reduce(squared, group=mesh.get_group(dim))
        total = total + squared.to(device)
    return total


@torch.no_grad()
def scale_to_norm(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply all `tensors` by max_norm / norm where that is below 1, without a host sync."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        part = local(tensor)
        by_device[part.device].append(part)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for device, parts in by_device.items():
        torch._foreach_mul_(parts, factor.to(device))


def _sharding(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    if not isinstance(tensor, DTensor):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a gradient is not reduced over its mesh yet")
    dims = tuple(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tensor.device_mesh, dims
