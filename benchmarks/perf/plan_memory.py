"""Predicted against measured memory of model, gradients and optimizer state of a rank, by engine.

Measured on two ranks with the 15M Llama: bytes of all live tensor storages that the run made, after
the second step's backward, when gradients and optimizer state exist together. That is what `plan`
calls held; what comes and goes inside a step is not compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"type": "fsdp"},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=ENGINES, help="engine to measure; the parent starts these under torchrun")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.precision, arguments.out)
        return
    from machine import conditions, write_result

    measured_under = conditions()
    figures: dict[str, Any] = {}
    for precision in arguments.precisions:
        for name in ENGINES:
            out = Path(tempfile.mkdtemp()) / "figures.json"
            torchrun = Path(sys.executable).with_name("torchrun")
            command = [torchrun, "--standalone", "--nproc-per-node", "2", __file__, "--worker", name]
            command += ["--precision", precision, "--out", out]
            subprocess.run(list(map(str, command)), check=True, cwd=Path(__file__).parent)
            figures[f"{name}_{precision}"] = json.loads(out.read_text())
    write_result("plan_memory", figures, measured_under)


def measure(name: str, precision: str, out: Path) -> None:
    """Compare one engine on this rank; rank 0 writes."""
    from common import recipe_15m

    from leanmill.parallel.launch import finish, init_processes
    from leanmill.plan.plan import plan

    batch = {"tokens_per_step": 1024, "tokens_per_micro_batch": 256}
    data = {"sequence_length": 256, "tokenizer": {"vocab_size": 8192}}
    recipe = recipe_15m(precision=precision, engine=ENGINES[name], batch=batch, data=data)
    ranks = init_processes("cpu", recipe.cluster)
    predicted = plan(recipe, 2).held_bytes
    measured = held_after_backward(recipe, ranks)
    if ranks.rank == 0:
        figures = {"predicted_bytes": predicted, "measured_bytes": measured, "ratio": predicted / measured}
        out.write_text(json.dumps(figures))
    finish()
    sys.stdout.flush()
    os._exit(0)


def held_after_backward(recipe: Any, ranks: Any) -> int:
    """Bytes of the storages made since the start, after the second backward."""
    from leanmill.models.build import build_on_meta
    from leanmill.parallel.build import build_engine
    from leanmill.trainer.prepare import prepare

    before = storages()
    model = build_on_meta(recipe.model, vocab_size=8192, device_type="cpu")
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision=recipe.train.precision, model_bytes=0)
    prepare(recipe, model, engine, num_micro_batches=2)
    ids = torch.arange(256)[None]
    micro_batch = {"input_ids": ids, "labels": ids, "position_ids": ids}
    for step in range(2):
        engine.forward_backward([micro_batch, micro_batch], torch.tensor(1024.0))
        engine.clip(1.0)
        if step == 0:
            engine.step(torch.tensor(False))
    for parameter in engine.module.parameters():
        _ = parameter.grad  # gradients that only C++ holds so far become visible to the collector
    gc.collect()
    return sum(size for address, size in storages().items() if address not in before)


def storages() -> dict[int, int]:
    """Bytes of every live CPU storage by address."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            if torch._C._functorch.is_functorch_wrapped_tensor(thing):
                continue  # left over from a mask built under vmap; it has no storage of its own
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
