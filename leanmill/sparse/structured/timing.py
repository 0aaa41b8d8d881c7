"""How long pieces of a model take here, and files of such figures that ranks agree on."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.core.surgery import CalibratedModel


_ROUNDS = 15
"""Measurements of each job, all jobs in turn; the least counts, which other work on the machine hardly moves."""
_WARM_UPS = 2
_Key = TypeVar("_Key", bound=Hashable)


@torch.no_grad()
def least_times(jobs: Mapping[_Key, Callable[[], Any]], device: torch.device) -> dict[_Key, float]:
    """Return the least time of each job, in microseconds.

    Args:
        jobs: What is called.
        device: Where it computes.
    """
    least = dict.fromkeys(jobs, float("inf"))
    for number in range(_WARM_UPS + _ROUNDS):
        for key, job in jobs.items():
            _wait(device)
            start = time.perf_counter()
            job()
            _wait(device)
            if number >= _WARM_UPS:
                least[key] = min(least[key], 1e6 * (time.perf_counter() - start))
    return least


def is_there(model: CalibratedModel, path: str, technique: str) -> bool:
    """Whether there is a table; all ranks must see it, or those without would measure and wait for the others.

    Args:
        model: Whose ranks these are.
        path: Of the table.
        technique: Who asks.

    Raises:
        ConfigError: Some ranks see it and others do not.
    """
    seen, ranks = model.total(torch.tensor([float(Path(expand_user(path)).is_file()), 1.0])).tolist()
    if 0 < seen < ranks:
        raise ConfigError(
            f"{technique}.latency_table {path} is on some machines and not on others; copy it to all of them, or "
            f"remove it to have it measured here"
        )
    return bool(seen > 0)


def mean_of_ranks(model: CalibratedModel, times: Mapping[_Key, float]) -> dict[_Key, float]:
    """Return the mean over ranks, each of which measured the same jobs; a collective."""
    *total, ranks = model.total(torch.tensor([*times.values(), 1.0], dtype=torch.float64)).tolist()
    return {key: value / ranks for key, value in zip(times, total, strict=True)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
