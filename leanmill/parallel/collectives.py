"""Small collectives over all ranks, or those that `among` names; no-ops on one process. Every one of them must call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


_data_group: dist.ProcessGroup | None = None
"""The ranks that `sum_over_ranks` adds up; None for all."""


def set_data_group(group: dist.ProcessGroup | None) -> None:
    """Say which ranks read different data, this one among them; None where all do.

    An engine says it for as long as it is there, and takes it back when it is closed: what a process does between
    two engines (passes, reading data) is shared out over all ranks.
    """
    global _data_group  # noqa: PLW0603 (as process groups themselves, it is one of the process)
    _data_group = group


_among: dist.ProcessGroup | None = None
"""The ranks that collectives here are over; None for all."""


@contextmanager
def among(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let "all ranks" in this module be those of `group`, this one among them; None changes nothing."""
    global _among  # noqa: PLW0603 (as process groups themselves, it is one of the process)
    before, _among = _among, group or _among
    try:
        yield
    finally:
        _among = before


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the element-wise sum of `tensor` over the ranks that read different data; the argument is left as it is.

    Ranks of a tensor-parallel group read the same, and what they count counts once.
    """
    return reduced(tensor, "sum", _data_group)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Return the element-wise maximum of `tensor` over all ranks; the argument is left as it is."""
    return reduced(tensor, "max")


def reduced(tensor: Tensor, op: Literal["sum", "max", "min"], group: dist.ProcessGroup | None = None) -> Tensor:
    """Return `tensor` reduced element-wise over the ranks of `group` (all of them); the argument is left as it is."""
    if not _is_distributed(group):
        return tensor.clone()
    device = collective_device() if tensor.device.type == "cpu" else tensor.device
    result = tensor.detach().to(device, copy=True)
    dist.all_reduce(result, op=getattr(dist.ReduceOp, op.upper()), group=group or _among)
    return result.to(tensor.device)


def begin_max_over_ranks(tensor: Tensor) -> Callable[[], Tensor]:
    """Start an element-wise maximum of a CPU tensor; the function returned waits for it and gives it.

    The reduction runs between the hosts (gloo) where there is such a group.
    """
    if not _is_distributed():
        result = tensor.clone()
        return lambda: result
    result = tensor.detach().to(collective_device(), copy=True)
    work = dist.all_reduce(result, op=dist.ReduceOp.MAX, group=_among, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return result.to(tensor.device)

    return wait


def broadcast_object(value: Any = None) -> Any:
    """Return rank 0's `value` on every rank.

    Args:
        value: Anything JSON can hold; only rank 0's counts. It comes back as JSON returns it
            (tuples as lists), on rank 0 too, so that ranks cannot differ.
    """
    if not _is_distributed():
        return json.loads(json.dumps(value))
    device = collective_device()
    encoded = json.dumps(value).encode() if is_first_rank() else b""
    size = torch.tensor([len(encoded)], device=device)
    dist.broadcast(size, group=_among, group_src=0)
    if is_first_rank():
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(device)
    else:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, group=_among, group_src=0)
    return json.loads(bytes(data.tolist()))


def same_on_all_ranks(value: Any) -> bool:
    """Whether every rank gave the same `value`, anything JSON can hold; one small reduction."""
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=7).digest()
    number = int.from_bytes(digest, "big")
    highest, lowest = max_over_ranks(torch.tensor([number, -number])).tolist()
    return int(highest) == -int(lowest)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, by rank, on every rank; anything JSON can hold."""
    if not _is_distributed():
        return [json.loads(json.dumps(value))]
    device, world_size = collective_device(), dist.get_world_size(_among)
    encoded = json.dumps(value).encode()
    longest = int(max_over_ranks(torch.tensor([len(encoded)])))
    mine = torch.frombuffer(bytearray(encoded.ljust(longest)), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine, group=_among)
    return [json.loads(bytes(data.tolist())) for data in everyone]


@dataclass(frozen=True)
class Gathered:
    """What all ranks gave."""

    all: Tensor
    """Theirs one behind the other, by rank, along the first dim."""
    rank: int
    """This one's."""


def gathered(tensor: Tensor) -> Gathered:
    """Return every rank's `tensor` [n, ...], of one shape and dtype on all; without gradients."""
    if not _is_distributed():
        return Gathered(tensor.detach(), 0)
    device = collective_device() if tensor.device.type == "cpu" else tensor.device
    mine = tensor.detach().to(device).contiguous()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(_among))]
    dist.all_gather(everyone, mine, group=_among)
    return Gathered(torch.cat(everyone).to(tensor.device), dist.get_rank(_among))


def is_alone() -> bool:
    """Whether this is the only process."""
    return not _is_distributed()


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return not _is_distributed() or dist.get_rank(_among) == 0


def barrier() -> None:
    """Return once every rank has called it."""
    if _is_distributed():
        # A reduction rather than dist.barrier, which guesses a device under NCCL.
        token = torch.zeros(1, device=collective_device())
        dist.all_reduce(token, group=_among)
        token.item()


def _is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group or _among) > 1


def collective_device() -> torch.device:
    """Where small tensors of unknown home are reduced: the CPU unless only NCCL is there."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
