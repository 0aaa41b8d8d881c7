"""What a kernel is measured against on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuCase:
    """One kernel call, with what bounds it and whom it meets."""

    name: str
    run: Callable[[], object]
    """One whole call on CUDA tensors."""
    num_bytes: int | None = None
    """Least bytes the call has to move: gives the share of the measured copy bandwidth."""
    num_flops: int | None = None
    """FLOPs of the call: gives the share of the measured dense matmul in `flops_dtype`."""
    flops_dtype: str = "bfloat16"
    peer: Callable[[], object] | None = None
    peer_name: str = ""
    least_bandwidth_share: float | None = None
    least_matmul_share: float | None = None
    most_time_over_peer: float | None = None
