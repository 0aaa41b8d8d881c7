"""What of a state this rank writes, and a copy of it that training cannot change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Snapshot:
    """Chunks this rank writes, each with its data."""

    items: list[WriteItem]
    tensors: list[Tensor]
    """Local data of each item; plain tensors."""


@dataclass
class _Buffers:
    """What a part looked like at the last save, with host memory to copy it into."""

    signature: list[tuple[str, torch.Size, torch.dtype]]
    items: list[WriteItem]
    tensors: list[Tensor] = field(default_factory=list)


class Snapshots:
    """Takes snapshots, reusing plans and host buffers from save to save.

    Each chunk is written by one rank: a plain tensor by rank 0, a shard by the rank that is first
    along every mesh dim it is replicated over. So a rank copies only what it writes.

    Args:
        rank: This process's rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._parts: dict[str, _Buffers] = {}

    @torch.no_grad()
    def take(self, part: str, state: Mapping[str, Tensor], *, copy: bool) -> Snapshot:
        """Return this rank's chunks of `state`.

        Args:
            part: Name under which plan and buffers are kept.
            state: Names to tensors, DTensor where sharded.
            copy: Copy into host buffers, valid until the next snapshot of this part; otherwise the
                snapshot refers to the live tensors.
        """
        owned = {name: tensor for name, tensor in state.items() if _writes(tensor, self.rank)}
        local = {name: _local(tensor) for name, tensor in owned.items()}
        signature = [(name, tensor.shape, tensor.dtype) for name, tensor in local.items()]
        kept = self._parts.get(part)
        if kept is None or kept.signature != signature:
            items = [item for name, tensor in owned.items() for item in _create_write_items(name, tensor)]
            kept = self._parts[part] = _Buffers(signature, items)
        sources = list(local.values())
        if not copy:
            return Snapshot(kept.items, sources)
        if not kept.tensors:
            kept.tensors = [_host_buffer(tensor) for tensor in sources]
        _copy_to_host(kept.tensors, sources)
        return Snapshot(kept.items, kept.tensors)


def _writes(tensor: Tensor, rank: int) -> bool:
    if not isinstance(tensor, DTensor):
        return rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    first = all(c == 0 for c, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate())
    # A rank past the end of an uneven tensor has nothing; a tensor without elements is written once.
    return first and (tensor.to_local().numel() > 0 or (tensor.numel() == 0 and not any(coordinate)))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _host_buffer(tensor: Tensor) -> Tensor:
    # Pinned memory lets the copy run at the bus's speed.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


def _copy_to_host(buffers: list[Tensor], sources: list[Tensor]) -> None:
    for buffer, source in zip(buffers, sources, strict=True):
        buffer.copy_(source, non_blocking=source.is_cuda)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


class SnapshotPlanner(DefaultSavePlanner):
    """Plans the write of a snapshot; torch's checks of overlap and coverage apply.

    Args:
        snapshot: This rank's chunks.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.snapshot = snapshot
        self._data: dict[MetadataIndex, Tensor] = {
            item.index: tensor for item, tensor in zip(snapshot.items, snapshot.tensors, strict=True)
        }

    def set_up_planner(
        self, state_dict: dict[str, object], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Everything is in the snapshot."""
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Return the snapshot's chunks."""
        self.plan = SavePlan(self.snapshot.items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check the ranks' plans against each other."""
        return super().create_global_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the data of a chunk."""
        return self._data[write_item.index]
