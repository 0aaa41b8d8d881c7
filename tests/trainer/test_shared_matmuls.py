"""What is said and done of a step that went wrong, where ranks share matmuls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # once here instead of in every forked rank
from torch import Tensor

from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, LayoutConfig
from leanmill.trainer.non_finite import source_of
from tests.distributed import run_ranks
from tests.parallel import tensor_cases as tensors
from tests.parallel.expert_cases import ROWS, share_of


@pytest.mark.slow
@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("engine", [DdpEngine(), FsdpEngine()], ids=["ddp", "fsdp"])
def test_the_rank_whose_heads_went_wrong_is_named(engine: EngineConfig, splits: bool) -> None:
    """Its neighbour gets the sum, and with it what is not finite, a matmul later."""

    def body() -> str:
        layout = LayoutConfig(tp=2, sequence_parallel=splits)
        made: Any = tensors.prepared(engine, layout=layout, dtype=torch.float32, num_micro_batches=2)

        def spoil(module: Any, args: Any, output: Tensor) -> Tensor | None:
            return output.index_fill(0, torch.tensor([3]), float("inf")) if dist.get_rank() == 1 else None

        made.module.model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_hook(spoil)
        parts, num_valid = share_of(made, 0, 2)
        ids = torch.arange(100, 100 + ROWS).chunk(2)
        return source_of(made, [{**part, "row_ids": rows} for part, rows in zip(parts, ids, strict=True)], num_valid)

    told = run_ranks(body, 2)
    assert all(
        one.startswith("first in model.layers.1.self_attn.q_proj, whose input is finite (rank 1") for one in told
    )
