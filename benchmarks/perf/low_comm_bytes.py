"""Bytes that a rank sends a step, workers that train alone against an all-reduce in every step: counted at 4 ranks.

Each message is counted where it is handed to the process group, and weighed with what a ring of W ranks has each of
them send of it: 2 (W - 1) / W of its bytes for an all-reduce, W - 1 times its own for a gather.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import conditions, write_result
from torch import Tensor, nn

from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DdpEngine, LayoutConfig, SingleEngine
from leanmill.parallel.ddp import DdpEngine as Ddp
from leanmill.parallel.engine import Engine, Preparation
from leanmill.parallel.launch import Ranks
from leanmill.parallel.low_comm.build import outer_steps


NUM_RANKS, EVERY_STEPS, NUM_STEPS, NUM_TOKENS = 4, 100, 2, 16
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "streaming_diloco e3m0": {"type": "streaming_diloco"},
    "diloco fp32": {"type": "diloco"},
    "diloco bf16": {"type": "diloco", "gradient_dtype": "bf16"},
    "diloco e3m0": {"type": "diloco", "gradient_dtype": "e3m0"},
    "co2 fp32": {"type": "co2"},
}


class SumLoss(nn.Module):
    """The model with its sum over tokens."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        return {"total": nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")}


@contextmanager
def counting() -> Iterator[list[int]]:
    """Note what this rank sends with each collective that Python asks for."""
    found: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(_of_reduction(tensor))
        return reduce(tensor, *args, **kwargs)

    def counted_gather(rows: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((len(rows) - 1) * tensor.numel() * tensor.element_size())
        return gather(rows, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather
    try:
        yield found
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather


def _of_reduction(tensor: Tensor) -> int:
    return 2 * (NUM_RANKS - 1) * tensor.numel() * tensor.element_size() // NUM_RANKS


def of_all_reduces() -> float:
    """Bytes a step under DDP, whose buckets a hook counts."""
    engine = prepared(DdpEngine(), LayoutConfig())
    found: list[int] = []

    # DDP reads annotations, and not as text.
    def hook(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        found.append(_of_reduction(bucket.buffer()))
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / NUM_RANKS)

    assert isinstance(engine, Ddp)
    engine._replicated.register_comm_hook(None, hook)
    for _ in range(NUM_STEPS):
        ids = torch.randint(SIZES["vocab_size"], (1, NUM_TOKENS))
        engine.forward_backward([{"input_ids": ids, "labels": ids}], torch.tensor(float(NUM_TOKENS * NUM_RANKS)))
        engine.step(torch.tensor(False))
    return sum(found) / NUM_STEPS


def of_workers(low_comm: dict[str, Any]) -> float:
    """Bytes a step in the second interval, when all that is ever under way is; weights rest, which changes no bytes."""
    layout = LayoutConfig.model_validate({"low_comm": {"workers": NUM_RANKS, "every_steps": EVERY_STEPS, **low_comm}})
    assert layout.low_comm is not None
    outer = outer_steps(layout.low_comm, prepared(SingleEngine(), layout))
    with counting() as found:
        for step in range(1, 2 * EVERY_STEPS + 1):
            outer.after_step(step, is_last=False)
            if step == EVERY_STEPS:
                found.clear()
    return sum(found) / EVERY_STEPS


def prepared(config: Any, layout: LayoutConfig) -> Engine:
    torch.manual_seed(0)
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=NUM_RANKS, local_rank=rank, device=torch.device("cpu"))
    engine, _ = build_engine(config, ranks=ranks, precision="fp32", model_bytes=1, layout=layout)
    engine.prepare(
        SumLoss(),
        Preparation(
            materialise=lambda module: None,
            make_optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
            num_micro_batches=1,
            max_grad_norm=None,
        ),
    )
    return engine


def work(folder: Path) -> None:
    """One rank."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_RANKS)
    reduced = of_all_reduces()
    figures: dict[str, Any] = {"all_reduce_bytes_a_step": reduced, "every_steps": EVERY_STEPS, "ranks": NUM_RANKS}
    for name, low_comm in CASES.items():
        found = of_workers(low_comm)
        figures[name] = {"bytes_a_step": found, "over_all_reduce": found / reduced}
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--meeting", type=Path, help="set for the ranks that this script starts")
    arguments = parser.parse_args()
    if arguments.meeting is not None:
        work(arguments.meeting)
    measured_under = conditions()
    with tempfile.TemporaryDirectory() as folder:
        world = {"WORLD_SIZE": str(NUM_RANKS), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--meeting", folder]
        started = [subprocess.Popen(command, env=os.environ | world | {"RANK": str(rank)}) for rank in range(NUM_RANKS)]
        if any(codes := [process.wait() for process in started]):
            sys.exit(f"ranks ended with {codes}")
        figures = json.loads((Path(folder) / "figures.json").read_text())
    write_result("low_comm_bytes", figures, measured_under)


if __name__ == "__main__":
    main()
