"""What is said of a step whose loss or gradient is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.parallel import config as configs
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DdpEngine, FsdpEngine, SingleEngine
from leanmill.parallel.deepspeed import DeepSpeedEngine
from leanmill.parallel.engine import Engine
from leanmill.trainer.non_finite import described, source_of
from tests.distributed import run_ranks
from tests.parallel import cases


NUM_ROWS = 16


def engine_of(kind: str, module: nn.Module) -> Engine:
    if kind.startswith("zero"):
        config = configs.DeepSpeedEngine(stage=int(kind[-1]))
        engine: Engine = DeepSpeedEngine(config, device=torch.device("cpu"), precision="fp32", persist_below=0)
    else:
        config = {"single": SingleEngine, "ddp": DdpEngine, "fsdp": FsdpEngine}[kind]()
        engine, _ = build_engine(config, ranks=cases.ranks_here(), precision="fp32", model_bytes=0)
    engine.prepare(module, cases.preparation(lambda live: cases.adamw(live, foreach=False)))
    return engine


def batch_of(engine: Engine) -> tuple[list[dict[str, Tensor]], Tensor]:
    """As the loop has it: rows have the numbers 100 to 115."""
    parts, num_valid = cases.share_of(engine, 0)
    size = NUM_ROWS // engine.data_size
    ids = torch.arange(100, 100 + NUM_ROWS)[engine.data_rank * size :][:size].chunk(len(parts))
    return [{**part, "row_ids": rows} for part, rows in zip(parts, ids, strict=True)], num_valid


def poisoned(name: str, calls: set[int], rank: int, row: int = 3) -> nn.Module:
    """The tiny model, one of whose modules gives an inf in some of its calls on one rank."""
    module = cases.make_module(torch.float32, tied=False)
    seen = 0

    def spoil(part: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal seen
        seen += 1
        here = dist.get_rank() if dist.is_initialized() else 0
        if here != rank or (seen - 1) % cases.NUM_MICRO_BATCHES not in calls:
            return None
        return output.index_fill(0, torch.tensor([row]), float("inf"))

    module.model.get_submodule(name).register_forward_hook(spoil)
    return module


@pytest.mark.parametrize(
    "kind", ["fsdp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "zero1", "zero3"))]
)
def test_the_first_module_its_rank_and_its_rows_are_named_under_every_engine(kind: str) -> None:
    def body() -> tuple[str, bool]:
        engine = engine_of(kind, poisoned("model.layers.1.mlp.down_proj", {1}, rank=1))
        before = cases.full_weights(engine)
        told = source_of(engine, *batch_of(engine))
        after = cases.full_weights(engine)
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        # The next step is as any other.
        engine.module.model.get_submodule("model.layers.1.mlp.down_proj")._forward_hooks.clear()
        norm = [engine.forward_backward(*batch_of(engine)), engine.clip(None)][1]
        return told, unchanged and bool(torch.isfinite(norm))

    for told, is_well in run_ranks(body, 2):
        # Rank 1 has rows 108 to 115; the second micro-batch is 112 to 115, its row of index 3 the last.
        assert told == (
            "first in model.layers.1.mlp.down_proj, whose input is finite (rank 1, micro-batch 2, rows 115 of the data)"
        )
        assert is_well


def test_rows_are_named_of_the_micro_batch_that_was_under_way_whatever_the_order() -> None:
    engine = engine_of("single", poisoned("model.layers.1.mlp.down_proj", {0}, rank=0))
    in_order = engine.forward_backward
    engine.forward_backward = lambda batches, num_valid: in_order(batches[::-1], num_valid)  # type: ignore[method-assign]
    told = source_of(engine, *batch_of(engine))
    assert told.endswith("(rank 0, micro-batch 2, rows 111 of the data)")


def test_a_weight_that_is_not_finite_is_named() -> None:
    engine = engine_of("single", cases.make_module(torch.float32, tied=False))
    with torch.no_grad():
        engine.module.model.model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    told = source_of(engine, *batch_of(engine))
    assert told.startswith("first in model.layers.0.mlp.gate_proj, whose weight is not finite itself (rank 0, micro-")
    assert "micro-batch 1, rows 100, 101, 102, 103, ... of the data" in told


class SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def test_a_gradient_that_is_not_finite_is_named() -> None:
    module = cases.make_module(torch.float32, tied=False)
    module.model.model.layers[0].mlp.register_forward_hook(lambda part, args, output: SpoilGradient.apply(output))
    engine = engine_of("single", module)
    told = source_of(engine, *batch_of(engine))
    assert told.startswith("the forward is finite; of gradients the first that is not, from the output, is that of ")
    assert told.endswith("model.layers.0.post_attention_layernorm.weight")


def test_a_step_that_is_finite_the_second_time_is_said_to_be() -> None:
    engine = engine_of("single", cases.make_module(torch.float32, tied=False))
    assert source_of(engine, *batch_of(engine)).startswith("a second pass over the same rows is finite")
    assert all(p.grad is None for p in engine.module.parameters())


def test_what_ranks_find_becomes_one_sentence() -> None:
    nothing = {"forward": None, "losses": [], "gradient": None}
    found = {"module": "model.norm", "weight": None, "input_is_finite": False, "micro_batch": 0, "rows": []}
    assert described([nothing, {**nothing, "forward": found}]) == (
        "first in what model.norm is given (rank 1, micro-batch 1)"
    )
    assert described([{**nothing, "forward": found}] * 7).endswith("; and on 3 more ranks")
    told = described([{**nothing, "losses": ["total", "distill"]}, nothing])
    assert told == "the model's forward is finite, the loss distill is not"
