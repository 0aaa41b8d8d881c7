"""Starting and ending the processes of a run, under torchrun or alone.

The end matters: a rank that ran collectives inside autograd can be aborted by threads that are
still alive when the interpreter exits, about one exit in ten on gloo, which turns a finished job
into a failed one. A launch script therefore calls `finish`, flushes its streams and leaves through
`os._exit(code)`.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from leanmill.core.errors import ConfigError
from leanmill.parallel import shared_errors
from leanmill.parallel.collectives import barrier
from leanmill.parallel.flight import start_recorder
from leanmill.parallel.meeting import Meeting


log = logging.getLogger(__name__)

_keep_timeout: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
"""Groups whose maker stated a time-out of their own."""


class ClusterSettings(Protocol):
    """What `init_processes` reads of a recipe's `cluster` section."""

    @property
    def init_timeout_seconds(self) -> int:
        """Collective time-out until `set_timeout`."""

    @property
    def flight_recorder(self) -> bool:
        """Whether collectives are recorded."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of the run's processes this one is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    """The device this process computes on."""
    local_world_size: int | None = None
    """Processes on this machine; None takes all of them to be here."""
    flight_recorder: str | None = None
    """Prefix of the files NCCL's flight recorder dumps after a hang, where it is on; each rank's
    number is appended."""


def init_processes(device: Literal["auto", "cpu", "cuda"], cluster: ClusterSettings) -> Ranks:
    """Join the process group that torchrun describes, or be the only process.

    Args:
        device: `auto` is cuda where there is one.
        cluster: Time-outs and flight recorder.

    Raises:
        ConfigError: No such device, fewer GPUs than processes on this machine, or no address to meet at.
        RunError: A rank was missing for `cluster.init_timeout_seconds`.
    """
    rank, world_size = _env("RANK", 0), _env("WORLD_SIZE", 1)
    local_rank, local_world_size = _env("LOCAL_RANK", 0), _env("LOCAL_WORLD_SIZE", world_size)
    target = _choose_device(device, local_rank, local_world_size)
    recorder = start_recorder(is_dumped=target.type == "cuda") if cluster.flight_recorder and world_size > 1 else None
    if target.type == "cuda":
        torch.cuda.set_device(target)
    else:
        set_threads(local_world_size)
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=target,
        local_world_size=local_world_size,
        flight_recorder=recorder,
    )
    if world_size > 1:
        _warn_of_shared_store()
        _warn_of_short_shutdown(rank)
        ensure_process_group(ranks, timeout_seconds=cluster.init_timeout_seconds)
    if recorder is not None and rank == 0 and target.type == "cuda":
        log.info("NCCL flight recorder: after a hang each machine has %s<rank>", recorder)
    return ranks


def ensure_process_group(ranks: Ranks, *, timeout_seconds: int = 1800) -> None:
    """Create the default process group where there is none yet, once every rank is there.

    On CUDA it has gloo for CPU tensors beside NCCL: offloaded parameters and checkpoints need it.

    Raises:
        ConfigError: The environment names no address, or its port is taken.
        RunError: A rank was missing for `timeout_seconds`.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if ranks.world_size == 1:
        # A store of this process alone: no port, nothing another run on this machine could meet.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        meeting = Meeting(
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_rank=ranks.local_rank,
            timeout_seconds=timeout_seconds,
        )
        store = meeting.join()
        shared_errors.use_store(store, ranks.rank, ranks.world_size)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def patient_group(timeout: timedelta) -> dist.ProcessGroup:
    """Return a new gloo group of all ranks whose time-out `set_timeout` leaves as it is; collective.

    Args:
        timeout: How long a collective of the group may wait for its slowest rank.
    """
    group = dist.new_group(backend="gloo", timeout=timeout)
    _keep_timeout.add(group)
    return group  # type: ignore[no-any-return]


def keep_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Give a group a time-out that `set_timeout` leaves as it is."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)
    _keep_timeout.add(group)


def set_timeout(seconds: int) -> None:
    """Set the time-out of collectives from now on: short once compilation and loading are over, long before others.

    A `patient_group` keeps its own, as does one that `keep_timeout` was called with: what it waits for has nothing to
    do with the length of a step.
    """
    if not dist.is_initialized():
        return
    # No rank may still be inside slow start-up work when a short limit begins to count.
    barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_rank(group) >= 0 and group not in _keep_timeout:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish() -> None:
    """Take the process group down; the launch script then leaves through `os._exit`.

    Objects that hold autograd nodes of collectives are collected first, since destroying their
    group under them aborts the process now and then.
    """
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def set_threads(local_world_size: int) -> None:
    """Give each process its share of the cores, unless OMP_NUM_THREADS decides.

    torchrun sets OMP_NUM_THREADS=1 where the caller has not; set it yourself to use more.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // local_world_size))


def num_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _env(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError:
        raise ConfigError(
            f"{name}={value!r} in the environment is no number; start with torchrun, or unset it"
        ) from None


def _choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    num_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and num_gpus == 0:
        raise ConfigError("device: cuda was asked for, but torch sees no GPU here; set device=cpu or device=auto")
    if num_gpus == 0:
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise ConfigError(
            f"{local_world_size} processes were started on a machine with {num_gpus} GPUs; "
            f"type torchrun --nproc-per-node {num_gpus}, or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def _warn_of_shared_store() -> None:
    """Restarted workers of a shared store meet the addresses of their dead predecessors."""
    restarts = _env("TORCHELASTIC_MAX_RESTARTS", 0)
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning(
            "torchrun may restart workers %d times, which fails or hangs on stale addresses unless "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set in torchrun's own environment",
            restarts,
        )


def _warn_of_short_shutdown(rank: int) -> None:
    """The torchrun of PyTorch before 2.12 does not know the time-out that was set."""
    if rank == 0 and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ and torch.__version__ < "2.12":
        log.warning(
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=%s is set, and the torchrun of PyTorch %s kills ranks 30 s after a signal "
            "all the same; install PyTorch 2.12, or send SIGUSR1 to the ranks themselves",
            os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"],
            torch.__version__,
        )
