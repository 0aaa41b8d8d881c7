from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from leanmill.models.build import build_on_meta
from leanmill.models.counting import num_parameters
from leanmill.parallel.build import build_engine
from leanmill.parallel.launch import Ranks
from leanmill.trainer.prepare import prepare
from tests.contract_cases import ENGINES, recipe_of
from tests.distributed import run_ranks


def _counts(engine):
    recipe = recipe_of((), engine, "", 2)
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    model = build_on_meta(recipe.model)
    whole = num_parameters(model)[0]
    built, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0)
    return whole, prepare(recipe, model, built, num_micro_batches=2).num_trainable


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_trainable_parameters_are_counted_whole_under_sharding(engine):
    for whole, num_trainable in run_ranks(_counts, 2, ENGINES[engine]):
        assert num_trainable == whole > 0
