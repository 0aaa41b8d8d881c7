"""Processes on this machine that train a recipe together over gloo, for a check; not how runs are started."""

from __future__ import annotations

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.quiet import quiet_libraries
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.parity.trace import Trace, trace


LIMIT_SECONDS = 300


def traced_alone(recipe: Recipe, dtype: torch.dtype, *, packed: bool) -> Trace:
    """Train a recipe in this process; see `leanmill.trainer.parity.trace.trace`."""
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    return trace(recipe, alone, dtype=dtype, packed=packed)


def traced_together(recipe: Recipe, world_size: int, dtype: torch.dtype, *, packed: bool) -> list[Trace]:
    """Train a recipe on new processes and return what each saw, by rank.

    Raises:
        ConfigError: It cannot be trained so.
        RunError: A process failed.
    """
    with tempfile.TemporaryDirectory(prefix="leanmill-parity-") as name:
        folder = Path(name)
        arguments = (recipe.model_dump(mode="json"), world_size, str(dtype), packed, str(folder))
        context = multiprocessing.start_processes(
            _rank, args=arguments, nprocs=world_size, join=False, start_method="spawn"
        )
        assert context is not None
        for process in context.processes:
            process.join(LIMIT_SECONDS)
            if process.is_alive():
                process.kill()
        for kind, error in (("refused", ConfigError), ("failed", RunError)):
            for rank in range(world_size):
                path = folder / f"{kind}-{rank}"
                if path.exists():
                    raise error(path.read_text(encoding="utf-8"))
        paths = [folder / f"trace-{rank}.pt" for rank in range(world_size)]
        missing = [rank for rank, path in enumerate(paths) if not path.exists()]
        if missing:
            raise RunError(f"rank {missing[0]} of {world_size} ended without a result, or took {LIMIT_SECONDS} s")
        return [torch.load(path, weights_only=False) for path in paths]


def _rank(rank: int, raw: dict[str, Any], world_size: int, dtype: str, packed: bool, folder: str) -> None:
    place = Path(folder)
    quiet_libraries()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place / 'meeting'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=LIMIT_SECONDS / 2),
        )
        ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
        kind = getattr(torch, dtype.removeprefix("torch."))
        torch.save(trace(Recipe.model_validate(raw), ranks, dtype=kind, packed=packed), place / f"trace-{rank}.pt")
    except ConfigError as error:
        (place / f"refused-{rank}").write_text(str(error), encoding="utf-8")
    except BaseException as error:
        told = "".join(traceback.format_exception_only(error)).strip()
        (place / f"failed-{rank}").write_text(f"rank {rank}: {told}", encoding="utf-8")
    # Not through the interpreter's exit, where gloo's threads may abort; and the others need not be waited for.
    os._exit(0)
