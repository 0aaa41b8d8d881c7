"""Every family whose rows ranks may share trains what one process trains, parameter by parameter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # noqa: F401 (once here instead of in every forked rank)

from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, LayoutConfig, SingleEngine
from leanmill.parallel.context_plan import FAMILIES
from tests.distributed import run_ranks
from tests.parallel import tensor_cases
from tests.parallel.test_tensor_parallel import assert_like_one_process


SIZES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 3}, "qwen2": {}}
"""With windows; with biases of queries alone. The others are those of `tensor_cases.FAMILIES`."""
LAYOUTS = {
    "ulysses 2": (LayoutConfig(cp=2), 2),
    "gathered 2": (LayoutConfig(cp=2, cp_attention="all_gather"), 2),
    "ulysses 4": (LayoutConfig(cp=4), 4),
    "ulysses 2 x 2": (LayoutConfig(cp=2), 4),
}
DOCUMENTS = {
    "ulysses 2": (LayoutConfig(cp=2, cp_rows="by_document"), 2),
    "ulysses 4": (LayoutConfig(cp=4, cp_rows="by_document"), 4),
    "gathered 2 x 2": (LayoutConfig(cp=2, cp_rows="by_document", cp_attention="all_gather"), 4),
}
ENGINES: dict[str, EngineConfig] = {"ddp": DdpEngine(), "fsdp": FsdpEngine()}


@cache
def reference(family: str) -> dict[str, Any]:
    return tensor_cases.trained(SingleEngine(), family=family, fused_loss=True, **SIZES.get(family, {}))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family: str, layout: str, engine: str) -> None:
    config, world_size = LAYOUTS[layout]
    options = {"family": family, "fused_loss": True, **SIZES.get(family, {})}
    results = run_ranks(lambda: tensor_cases.trained(ENGINES[engine], layout=config, **options), world_size)
    assert_like_one_process(results, reference(family), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", DOCUMENTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_by_document(family: str, layout: str, engine: str) -> None:
    config, world_size = DOCUMENTS[layout]
    # Three documents a micro-batch: some are cut, into two parts and into all.
    num_micro_batches = 8 // config.data_size(world_size)
    options = {"family": family, "fused_loss": True, "num_micro_batches": num_micro_batches, **SIZES.get(family, {})}
    results = run_ranks(lambda: tensor_cases.trained(ENGINES[engine], layout=config, **options), world_size)
    assert_like_one_process(results, reference(family), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_fp32(family: str) -> None:
    options = {"family": family, "fused_loss": True, "dtype": torch.float32, **SIZES.get(family, {})}
    wanted = tensor_cases.trained(SingleEngine(), **options)
    results = run_ranks(lambda: tensor_cases.trained(FsdpEngine(), layout=LayoutConfig(cp=2), **options), 2)
    assert_like_one_process(results, wanted, 2e-5)
