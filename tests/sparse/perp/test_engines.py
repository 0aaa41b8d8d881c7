"""What rests has no gradient and no optimizer state, whoever owns the optimizer."""

import pytest
import torch
import torch.distributed as dist

from leanmill.checkpoint.components import take_apart
from leanmill.parallel.launch import Ranks
from tests.contract_cases import ENGINES
from tests.contract_training import recipe_of, save_teacher, train
from tests.distributed import run_ranks


def _trained_names(engine, folder):
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank=rank, world_size=size, local_rank=rank, device=torch.device("cpu"))
    trained, _ = train(recipe_of(("perp", "lora"), engine, folder, size), ranks, num_steps=1)
    state = {name.rpartition("/")[0] for name in take_apart(trained.optimizer_state()) if "/" in name}
    wanted = {name for name, p in trained.module.model.named_parameters() if p.requires_grad}
    with_gradient = {name for name, p in trained.module.model.named_parameters() if p.grad is not None}
    trained.close()
    return state, wanted, with_gradient


@pytest.mark.parametrize(
    "engine",
    ["fsdp", "zero2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_the_rest_rests(engine, tmp_path):
    state, wanted, with_gradient = run_ranks(_trained_names, 2, ENGINES[engine], save_teacher(tmp_path))[0]
    assert state == wanted
    assert with_gradient <= wanted
    assert {name.rpartition(".")[2] for name in wanted} == {"lora_A", "lora_B", "weight", "bias"}
    assert all("norm" in name for name in wanted if name.endswith(".weight"))
