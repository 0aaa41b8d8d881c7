"""Taking quantised state (codes, scales) apart into plain tensors, which storage can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    """Give a rank's part a place in a DTensor: alike where it has the shape, else one row a rank."""
    mesh, placements = whole.device_mesh, whole.placements
    num_ranks = [mesh.size(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(num_ranks) != 1 or whole.shape[0] % num_ranks[0]:
        raise ConfigError(
            f"optimizer.type=adamw8bit: the state of {name} {list(whole.shape)} does not divide over the ranks it is "
            f"sharded over, so it cannot be saved; use optimizer.type=adamw, or engine: ddp"
        )
    if part.shape == whole._local_tensor.shape:
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    rows = [placement if placement.is_replicate() else Shard(0) for placement in placements]
    shape = torch.Size((num_ranks[0], *part.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part.unsqueeze(0), mesh, rows, run_check=False, shape=shape, stride=stride)
