"""What 1,024 ranks cost before and beside training: plan, layout, sharding, start, checkpoint planning and its index.

One process takes the place of one rank of a group that exists on paper (torch's fake process group); models of 70B
and 671B parameters are on the meta device, from transformers' config classes, without weights. Seconds are of that
rank alone on one core; bytes are of that rank. The position in 10^9 rows is `data_scale.py`'s.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch


NUM_RANKS, PER_NODE = 1024, 8
MODELS: dict[str, dict[str, Any]] = {
    "llama_70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "deepseek_v3_671b": {"model_type": "deepseek_v3", "vocab_size": 129280, "max_position_embeddings": 8192},
}
EXPERT_RANKS = {"llama_70b": 1, "deepseek_v3_671b": 64}


def recipe_of(name: str) -> Any:
    from leanmill.recipe.root import Recipe

    return Recipe.model_validate(
        {
            "name": name,
            "device": "cpu",
            "model": {"config": MODELS[name]},
            "data": {"sequence_length": 4096, "tokenizer": {"path": "unused"}},
            "engine": "fsdp",
            "layout": {"ep": EXPERT_RANKS[name]},
            "batch": {"tokens_per_step": NUM_RANKS * 4096 * 4, "tokens_per_micro_batch": 4096},
            "train": {"steps": 1000, "precision": "bf16"},
            "eval": {"tokens_per_domain": 4096},
        }
    )


class Timed:
    """Seconds of parts, and the most memory that the process has had by then."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}

    def __call__(self, name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = action()
        self.seconds[name] = time.perf_counter() - began
        print(f"{name}: {self.seconds[name]:.2f} s", file=sys.stderr, flush=True)
        self.peak_mib[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return found


def measure(name: str) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from leanmill.core.technique import InstallContext
    from leanmill.models.build import build_on_meta
    from leanmill.parallel.config import FsdpEngine as Config
    from leanmill.parallel.engine import Preparation
    from leanmill.parallel.fsdp import FsdpEngine
    from leanmill.parallel.launch import Ranks
    from leanmill.parallel.layout import resolve_layout
    from leanmill.plan.plan import plan
    from leanmill.trainer.prepare import assemble, optimizer_for

    timed, recipe = Timed(), recipe_of(name)
    planned = timed("plan, all engines", lambda: plan(recipe, NUM_RANKS, PER_NODE))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    ranks = Ranks(rank=0, world_size=NUM_RANKS, local_rank=0, device=torch.device("cpu"), local_world_size=PER_NODE)
    layout = resolve_layout(recipe.layout, recipe.engine, NUM_RANKS)
    timed("meshes", lambda: (layout.dense, layout.experts if layout.ep > 1 else None))
    model = timed("model on meta", lambda: build_on_meta(recipe.model, device_type="cpu"))
    context = InstallContext(load_frozen_model=None, vocab_size=model.config.vocab_size, seed=0)  # type: ignore[arg-type]
    _, module = timed("techniques, losses", lambda: assemble(recipe, model, context))
    engine = FsdpEngine(Config(), ranks=ranks, precision="bf16", layout=layout)
    preparation = Preparation(
        materialise=lambda module: module.to_empty(device="cpu"),  # storage of its own shares
        make_optimizer=lambda live: optimizer_for(recipe.optimizer, live.model, []),  # type: ignore[arg-type]
        num_micro_batches=4,
        max_grad_norm=1.0,
    )
    timed("sharding and optimizer", lambda: engine.prepare(module, preparation))
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in module.parameters())
    checkpoint = _checkpoint(timed, engine)
    return {
        "num_parameters": planned.num_parameters,
        "weights_of_the_rank_bytes": 4 * held,
        "seconds": timed.seconds,
        "peak_mib": timed.peak_mib,
        "draw": _draw(recipe, planned.num_parameters),
        **checkpoint,
    }


def _draw(recipe: Any, num_parameters: int) -> dict[str, float]:
    """Random weights of a model: the time of one large layer, as modules draw it, taken for all of the model's."""
    config = recipe.model.config
    linear = torch.nn.Linear(config.get("hidden_size", 7168), 4096, bias=False)
    began = time.perf_counter()
    torch.nn.init.normal_(linear.weight, std=0.02)
    seconds = time.perf_counter() - began
    return {
        "elements_per_second": linear.weight.numel() / seconds,
        "whole_model_seconds": seconds * num_parameters / linear.weight.numel(),
    }


def _checkpoint(timed: Timed, engine: Any) -> dict[str, Any]:
    """This rank's plan, what of all plans reaches the first rank, and the index it writes: of the weights."""
    from leanmill.checkpoint.snapshot import SnapshotPlanner, Snapshots
    from leanmill.checkpoint.storage import SafetensorsWriter

    state = engine.model_state()
    snapshot = timed("checkpoint: a rank's plan", lambda: Snapshots(0).take("model", state, copy=False))
    planner = SnapshotPlanner(snapshot)
    planner.set_up_planner({}, None, is_coordinator=True)
    own = planner.create_local_plan()
    plan_bytes = len(pickle.dumps(own))
    every = _of_all_ranks(own)
    _, metadata = timed("checkpoint: all ranks' plans checked", lambda: planner.create_global_plan(every))
    with tempfile.TemporaryDirectory() as name:
        writer = SafetensorsWriter(Path(name))
        results = _results(writer.prepare_global_plan(every))
        timed("checkpoint: index", lambda: writer.finish(metadata, results))
        index_bytes = (Path(name) / "index.json").stat().st_size
    return {
        "checkpoint_of_weights": {
            "tensors": len(own.items),
            "boxes": sum(len(plan.items) for plan in every),
            "plan_bytes_a_rank": plan_bytes,
            "index_bytes": index_bytes,
        }
    }


def _of_all_ranks(own: Any) -> list[Any]:
    """Every rank's plan, made of the first one's: each tensor as a grid of boxes of its size."""
    items: list[list[Any]] = [[] for _ in range(NUM_RANKS)]
    for item in own.items:
        data = item.tensor_data
        grid = product(*(range(0, whole, part) for whole, part in zip(data.size, data.chunk.sizes, strict=True)))
        for rank, corner in enumerate(islice(grid, NUM_RANKS)):
            sizes = [min(part, whole - at) for whole, part, at in zip(data.size, data.chunk.sizes, corner, strict=True)]
            chunk = replace(data.chunk, offsets=torch.Size(corner), sizes=torch.Size(sizes))
            index = replace(item.index, offset=torch.Size(corner))
            items[rank].append(replace(item, index=index, tensor_data=replace(data, chunk=chunk)))
    return [replace(own, items=of_rank) for of_rank in items]


def _results(plans: list[Any]) -> list[list[Any]]:
    """What ranks tell the first one once they have written."""
    from torch.distributed.checkpoint.storage import WriteResult

    from leanmill.checkpoint.manifest import FileRecord
    from leanmill.checkpoint.storage import _header, _properties, _Written

    found = []
    for plan in plans:
        record = FileRecord(size=1, xxh3_128="0" * 32)
        _, chunks = _header(plan.items, plan.storage_data)
        found.append(
            [
                WriteResult(
                    item.index, 1, _Written(chunk, _properties(item).dtype, tuple(item.tensor_data.size), record)
                )
                for item, chunk in zip(plan.items, chunks, strict=True)
            ]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=MODELS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return
    from machine import RESULTS, conditions

    measured_under = conditions()
    figures = {}
    for name in MODELS:
        done = subprocess.run([sys.executable, __file__, "--worker", name], check=True, capture_output=True, text=True)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
        # One file: a processor of any kind takes the place of a rank.
        found = {"figures": {"num_ranks": NUM_RANKS, "models": figures}, "conditions": measured_under}
        (RESULTS / "scale.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
