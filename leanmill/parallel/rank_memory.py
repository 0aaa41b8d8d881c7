"""How much memory a rank has."""

from __future__ import annotations

from pathlib import Path

import torch

from leanmill.parallel.collectives import max_over_ranks
from leanmill.parallel.launch import Ranks


def smallest_rank_memory(ranks: Ranks) -> int:
    """Bytes of the rank that has least, so that all decide alike. A collective."""
    # A negated maximum.
    mine = torch.tensor([-float(_rank_memory(ranks))], dtype=torch.float64)
    return int(-max_over_ranks(mine).item())


def _rank_memory(ranks: Ranks) -> int:
    """Bytes this rank may use: its GPU, or its share of the machine's (or container's) memory."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // (ranks.local_world_size or ranks.world_size)
