"""Predicted against measured memory of model, gradients and optimizer state, a rank, by engine.

Measured: bytes of live tensor storages reachable from the engine after two optimizer steps, plus
the gradients caught just before the second step; the same three parts that `plan` predicts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"type": "fsdp"},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
}


def main() -> None:
    from common import conditions, write_result

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", help="engine to measure (used by the parent under torchrun)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.precision, arguments.out)
        return
    measured_under = conditions()
    figures: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for name in ENGINES:
            out = Path(tempfile.mkdtemp()) / "figures.json"
            torchrun = Path(sys.executable).with_name("torchrun")
            command = [torchrun, "--nproc-per-node", "2", __file__, "--worker", name, "--precision", precision]
            subprocess.run([*map(str, command), "--out", str(out)], check=True, cwd=Path(__file__).parent)
            figures[f"{name}_{precision}"] = json.loads(out.read_text())
    write_result("plan_memory", figures, measured_under)


def measure(name: str, precision: str, out: Path) -> None:
    """Run two steps on this rank and compare with the plan; rank 0 writes."""
    import os

    from common import recipe_15m

    from leanmill.trainer.measure import measured_state_bytes
    from leanmill.trainer.plan import plan

    train = {"steps": 2, "precision": precision}
    recipe = recipe_15m(
        engine=ENGINES[name], train=train, batch={"tokens_per_step": 2048, "tokens_per_micro_batch": 1024}
    )
    measured = measured_state_bytes(recipe)
    predicted = plan(recipe, world_size=2)
    state = predicted.state_bytes_per_rank
    if measured.rank == 0:
        out.write_text(
            json.dumps(
                {"predicted_bytes": state, "measured_bytes": measured.num_bytes, "ratio": state / measured.num_bytes}
            )
        )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
