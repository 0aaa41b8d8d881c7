"""Ranks that share matmuls train what one process trains: losses, gradients, norms and weights, one by one.

With accumulation, recomputation, unequal numbers of targets on the ranks, and clipping that shows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of in every forked rank

from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, LayoutConfig, SingleEngine
from tests.distributed import run_ranks
from tests.parallel import tensor_cases as tensors


ENGINES: dict[str, EngineConfig] = {"ddp": DdpEngine(), "fsdp": FsdpEngine()}


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
    name: str, world_size: int, num_micro_batches: int = 1, tolerance: float = 1e-9, dp: int = 1, **options: Any
) -> None:
    layout = LayoutConfig(tp=2)
    results = run_ranks(
        lambda: tensors.trained(ENGINES[name], layout=layout, num_micro_batches=num_micro_batches, **options),
        world_size,
    )
    same = {key: value for key, value in options.items() if key not in ("recompute", "compiles", "fused_loss")}
    assert_like_one_process(results, reference(**same), tolerance)


@pytest.mark.parametrize(("name", "family"), [("ddp", "llama"), ("fsdp", "qwen3")])
def test_two_ranks_share_matmuls(name: str, family: str) -> None:
    """One of the two with losses in the head's place, from logits on one process."""
    is_ddp = name == "ddp"
    recompute = "full" if is_ddp else "none"
    check(name, 2, num_micro_batches=3, family=family, recompute=recompute, fused_loss=is_ddp)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(tensors.FAMILIES))
@pytest.mark.parametrize("name", list(ENGINES))
def test_families(name: str, family: str) -> None:
    check(name, 2, family=family)


@pytest.mark.slow
@pytest.mark.parametrize(("num_micro_batches", "recompute"), [(1, "none"), (3, "full")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", list(ENGINES))
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
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", list(ENGINES))
def test_losses_of_a_shared_vocabulary_are_those_of_logits(name: str, family: str) -> None:
    """One process takes them from whole logits. Norms of Gemma round to fp32, whatever the model's dtype."""
    tolerance = 1e-6 if family == "gemma2" else 1e-9
    check(name, 2, num_micro_batches=3, family=family, fused_loss=True, tolerance=tolerance)
