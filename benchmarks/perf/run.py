"""Run every performance benchmark in turn, each in its own process; results land in benchmarks/results."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path


BENCHMARKS = (
    "command_line",
    "step_time",
    "techniques",
    "weight_stages",
    "callback_step",
    "distill_step",
    "dpo_step",
    "checkpoint_stall",
    "data_prepare",
    "data_scale",
    "plan_memory",
    "layout_order",
    "scale",
    "compress_memory",
    "adapter_memory",
    "router_balance",
    "expert_bytes",
    "low_comm_bytes",
    "uneven_rows",
    "kernels",
    "moe_layer",
    "packed_generation",
    "quickstart",
)
ARGUMENTS = {"techniques": [[], ["--micro-batches", "2"]]}
"""Of benchmarks that run several times."""
PEERS = {"dpo_step": ("trl", "pip install --no-deps 'trl==1.16.0'")}
"""Packages that a benchmark compares with and this project does not need."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=BENCHMARKS, help=f"of {', '.join(BENCHMARKS)}; default all")
    folder = Path(__file__).parent
    for name in parser.parse_args().names:
        package, command = PEERS.get(name, ("torch", ""))
        if importlib.util.find_spec(package) is None:
            print(f"{name}: left out, since {package} is not installed: {command}", flush=True)
            continue
        for arguments in ARGUMENTS.get(name, [[]]):
            subprocess.run([sys.executable, str(folder / f"{name}.py"), *arguments], check=True, cwd=folder)


if __name__ == "__main__":
    main()
