"""Taking quantised state (codes, scales) apart into plain tensors, which storage can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leanmill.core.errors import ConfigError


def take_apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each quantised tensor by its parts, named `"<name>.<part>"`; the rest stays.

    The parts share the quantised tensor's memory, so reading into them fills it, bit for bit.
    Blocks do not align with shards, so sharded quantised state loads at the same number of ranks only.

    Raises:
        ConfigError: A quantised tensor is sharded unevenly.
    """
    return dict(part for name, tensor in state.items() for part in _parts(name, tensor))


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if isinstance(local, DTensor) or not is_traceable_wrapper_subclass(local):
        yield name, tensor
        return
    for key in local.__tensor_flatten__()[0]:
        part: Tensor = getattr(local, key)
        yield f"{name}.{key}", _sharded_like(tensor, part, name) if isinstance(tensor, DTensor) else part


def _sharded_like(whole: DTensor, part: Tensor, name: str) -> Tensor:
    """Give a rank's part a place in a DTensor: alike where it has the shape, else one entry of a grid of parts.

    The grid has a dim for each dim that the whole is sharded along, so that a part lies where its elements do,
    and the same elements in other parts make a grid of another shape.
    """
    mesh, placements = whole.device_mesh, cast(tuple[Any, ...], whole.placements)
    sharded = [(mesh.size(dim), placement) for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if whole._local_tensor.numel() * math.prod(size for size, _ in sharded) != whole.numel():
        raise ConfigError(
            f"optimizer.type=adamw8bit: the state of {name} {list(whole.shape)} does not divide over the ranks it is "
            f"sharded over, so it cannot be saved; use optimizer.type=adamw, or engine: ddp"
        )
    if part.shape == whole._local_tensor.shape:
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    dims: list[int] = sorted({placement.dim for _, placement in sharded})
    grid = [math.prod(size for size, placement in sharded if placement.dim == dim) for dim in dims]
    shape = torch.Size((*grid, *part.shape))
    stride = torch.empty(shape, device="meta").stride()
    places = [one if one.is_replicate() else _along(one, dims.index(one.dim)) for one in placements]
    local = part.view((1,) * len(dims) + part.shape)
    return DTensor.from_local(local, mesh, places, run_check=False, shape=shape, stride=stride)


def _along(placement: Any, dim: int) -> Any:
    """Return the placement along another dim."""
    factor = getattr(placement, "split_factor", None)
    return Shard(dim) if factor is None else type(placement)(dim, split_factor=factor)
