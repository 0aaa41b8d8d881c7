"""`leanmill launch`: torchrun with the defaults a run wants."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from leanmill.core.errors import ConfigError


def run(args: argparse.Namespace) -> NoReturn:
    """Become torchrun, which starts the ranks of `args.recipe` on this machine.

    Raises:
        ConfigError: The recipe is wrong, or several machines have no place to meet.
    """
    from leanmill.parallel.launch import num_cores
    from leanmill.recipe.io import load_recipe

    # What every rank would refuse is said once, without torchrun's traceback around it.
    load_recipe(args.recipe, args.overrides)
    num_ranks = args.ranks or _num_gpus() or 1
    command = torchrun(args.recipe, args.overrides, num_ranks, args.nodes, args.rendezvous, debug=args.debug)
    # Threads of one rank: its share of the cores; torchrun would take one and print a banner.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    sys.stdout.flush()
    os.execv(sys.executable, command)


def torchrun(
    recipe: str, overrides: Sequence[str], num_ranks: int, num_nodes: int, rendezvous: str | None, *, debug: bool
) -> list[str]:
    """Return the command line.

    Args:
        recipe: File.
        overrides: Of it.
        num_ranks: Of this machine.
        num_nodes: Machines.
        rendezvous: `host:port` where machines meet; one machine takes a free port of its own, so that two runs of a
            machine do not meet.
        debug: Show tracebacks.

    Raises:
        ConfigError: Several machines without a place to meet.
    """
    if num_nodes > 1 and rendezvous is None:
        raise ConfigError(f"--nodes {num_nodes} needs a place to meet; give --rendezvous HOST:PORT, the same on each")
    if rendezvous is None:
        meeting = ["--standalone"]
    else:
        meeting = ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous]
        meeting += ["--rdzv-id", "leanmill"]
    ranks = ["--nproc-per-node", str(num_ranks), "-m", "leanmill.cli.rank", "--config", recipe]
    shown = ["--debug"] if debug else []
    return [sys.executable, "-m", "torch.distributed.run", *meeting, *ranks, *overrides, *shown]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
