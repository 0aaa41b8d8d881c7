"""Ranks that share matmuls train what one process trains: losses, gradients, norms and weights, one by one.

With accumulation, recomputation, unequal numbers of targets on the ranks, and clipping that shows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of in every forked rank

from leanmill.optim.config import AdamW, Lion, OptimizerConfig
from leanmill.parallel.build import build_engine
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, LayoutConfig, SingleEngine
from tests.distributed import run_ranks
from tests.parallel import cases
from tests.parallel import tensor_cases as tensors


ENGINES: dict[str, EngineConfig] = {
    "ddp": DdpEngine(),
    "fsdp": FsdpEngine(),
    "offload": FsdpEngine(cpu_offload=True),
    "not resharded": FsdpEngine(reshard_after_forward=False),
}
BOTH = ("ddp", "fsdp")
TP_2 = LayoutConfig(tp=2)


@cache
def reference(**options: Any) -> dict[str, Any]:
    """What one process trains; of another dtype weights are other weights: they are drawn in it."""
    return tensors.trained(SingleEngine(), **options)


def assert_like_one_process(results: list[dict[str, Any]], wanted: dict[str, Any], tolerance: float) -> None:
    """Compare with relative errors, naming the ratio: 2, 0.5 or tp tells a bug apart."""
    for result in results:
        for kind in ("gradients", "weights"):
            assert result[kind].keys() == wanted[kind].keys()
            for name, value in wanted[kind].items():
                found = result[kind][name].double()
                error = ((found - value).norm() / value.norm().clamp(min=1e-12)).item()
                ratio = (found.norm() / value.norm()).item()
                assert error <= tolerance, f"{kind} of {name} are off by {error:.2g}; norms are as {ratio:.4g} to 1"
        assert result["norms"] == pytest.approx(wanted["norms"], rel=max(tolerance, 1e-6))
        assert result["norms"] == results[0]["norms"]
    by_data_rank = {result["data_rank"]: result["losses"] for result in results}
    for step, wanted_loss in enumerate(wanted["losses"]):
        total = sum(losses[step] for losses in by_data_rank.values())
        assert total == pytest.approx(wanted_loss, rel=1e-6)


def check(
    name: str,
    world_size: int,
    num_micro_batches: int = 1,
    tolerance: float = 1e-9,
    layout: LayoutConfig = TP_2,
    **options: Any,
) -> None:
    engine = ENGINES[name]
    results = run_ranks(
        lambda: tensors.trained(engine, layout=layout, num_micro_batches=num_micro_batches, **options), world_size
    )
    same = {key: value for key, value in options.items() if key not in ("recompute", "compiles", "fused_loss")}
    assert_like_one_process(results, reference(**same), tolerance)


@pytest.mark.parametrize(("name", "family"), [("ddp", "llama"), ("fsdp", "qwen3")])
def test_two_ranks_share_matmuls(name: str, family: str) -> None:
    """One of the two with losses in the head's place, from logits on one process."""
    is_ddp = name == "ddp"
    recompute = "full" if is_ddp else "none"
    check(name, 2, num_micro_batches=3, family=family, recompute=recompute, fused_loss=is_ddp)


def test_counts_are_of_the_ranks_with_different_data_while_the_engine_is_there() -> None:
    def sums() -> list[float]:
        engine, _ = build_engine(DdpEngine(), ranks=cases.ranks_here(), precision="fp32", model_bytes=0, layout=TP_2)
        during = sum_over_ranks(torch.ones(()))
        engine.close()
        return [float(during), float(sum_over_ranks(torch.ones(())))]

    assert run_ranks(sums, 2) == [[1.0, 2.0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", list(tensors.FAMILIES))
@pytest.mark.parametrize("name", BOTH)
def test_families(name: str, family: str) -> None:
    check(name, 2, family=family)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offload", "not resharded"])
def test_options_of_fsdp(name: str) -> None:
    check(name, 4, num_micro_batches=3, recompute="selective")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [Lion(lr=1e-3), AdamW(lr=1e-2, eps=1e-3, lookahead={"every": 2})])  # type: ignore[arg-type]
@pytest.mark.parametrize("name", BOTH)
def test_other_optimizers(name: str, optimizer: OptimizerConfig) -> None:
    check(name, 4, optimizer_config=optimizer)


@pytest.mark.slow
def test_parts_that_shards_do_not_divide() -> None:
    """Two ranks have 21 rows each of the MLP, and FSDP cuts those into 11 and 10; of the vocabulary 35."""
    check("fsdp", 4, intermediate_size=42, vocab_size=70)


@pytest.mark.slow
def test_hybrid_shards_of_parts() -> None:
    """Replicas of shards of parts: eight ranks."""
    check("fsdp", 8, num_micro_batches=3, layout=LayoutConfig(tp=2, dp_replicate=2), family="qwen3")


@pytest.mark.slow
@pytest.mark.parametrize(("num_micro_batches", "recompute"), [(1, "none"), (3, "full")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", BOTH)
def test_four_ranks_share_matmuls_and_data(name: str, family: str, num_micro_batches: int, recompute: str) -> None:
    check(name, 4, num_micro_batches, family=family, recompute=recompute)
    check(name, 4, num_micro_batches, family=family, recompute=recompute, dtype=torch.float32, tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("technique", list(tensors.TECHNIQUES))
@pytest.mark.parametrize(("name", "world_size"), [("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
def test_techniques(name: str, world_size: int, technique: str, num_micro_batches: int) -> None:
    same = {"technique": technique, "num_micro_batches": num_micro_batches}
    check(name, world_size, **same)
    check(name, world_size, **same, dtype=torch.float32, tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("technique", list(tensors.TECHNIQUES))
@pytest.mark.parametrize("name", BOTH)
def test_techniques_on_rows_that_do_not_lie_together(name: str, technique: str) -> None:
    check(name, 2, num_micro_batches=3, family="gpt2", technique=technique)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", BOTH)
def test_losses_of_a_shared_vocabulary_are_those_of_logits(name: str, family: str) -> None:
    """One process takes them from whole logits. Norms of Gemma round to fp32, whatever the model's dtype."""
    tolerance = 1e-6 if family == "gemma2" else 1e-9
    check(name, 2, num_micro_batches=3, family=family, fused_loss=True, tolerance=tolerance)
