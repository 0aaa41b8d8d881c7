"""Neither ranks nor accumulation change what an encoder learns from pairs: the batch of negatives is the whole step."""

import pytest
import torch
import torch.distributed as dist

from leanmill.parallel.launch import Ranks
from tests.contract_cases import ENGINES
from tests.distributed import run_ranks
from tests.sentences.pairs import full_parameters, recipe_of, save_teacher, train


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def techniques(tmp_path_factory):
    teacher = save_teacher(tmp_path_factory.mktemp("teacher"))
    return [
        {"type": "contrastive", "symmetric": True},
        {"type": "embedding_distill", "teacher": teacher, "weight": 0.5},
        {"type": "nm_sparsity"},
    ]


@pytest.fixture(scope="module")
def at_once(techniques):
    """One process, one micro-batch: nothing is gathered, nothing is looked at beforehand."""
    recipe = recipe_of(techniques, {"type": "single"}, num_micro_batches=1, world_size=1)
    engine, loop = train(recipe, ONE, num_micro_batches=1)
    return full_parameters(engine), loop.meter.record(step=2, tokens=1, lr=0.0, tokens_per_step=1, metrics={}).losses


def _on_two_ranks(engine, techniques, num_micro_batches):
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    recipe = recipe_of(techniques, engine, num_micro_batches=num_micro_batches, world_size=2)
    trained, loop = train(recipe, ranks, num_micro_batches=num_micro_batches)
    losses = loop.meter.record(step=2, tokens=1, lr=0.0, tokens_per_step=1, metrics={}).losses
    found = full_parameters(trained), losses
    trained.close()
    return found if rank == 0 else None


def equal(got, expected):
    assert got[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert got[1] == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize(
    "engine_name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("zero1", "zero2") else ()) for name in ENGINES],
)
def test_two_ranks_and_two_micro_batches_equal_one_of_all(engine_name, techniques, at_once):
    equal(run_ranks(_on_two_ranks, 2, ENGINES[engine_name], techniques, 2)[0], at_once)


def test_one_micro_batch_a_rank_is_gathered_in_its_forward(techniques, at_once):
    equal(run_ranks(_on_two_ranks, 2, ENGINES["ddp"], techniques, 1)[0], at_once)


def test_accumulation_alone(techniques, at_once):
    recipe = recipe_of(techniques, {"type": "single"}, num_micro_batches=4, world_size=1)
    engine, loop = train(recipe, ONE, num_micro_batches=4)
    losses = loop.meter.record(step=2, tokens=1, lr=0.0, tokens_per_step=1, metrics={}).losses
    equal((full_parameters(engine), losses), at_once)


def test_the_map_to_the_teachers_width_trains_and_the_loss_falls(techniques):
    recipe = recipe_of([techniques[1]], {"type": "single"}, num_micro_batches=1, world_size=1)
    start = full_parameters(train(recipe, ONE, num_micro_batches=1, num_steps=0)[0])
    after = full_parameters(train(recipe, ONE, num_micro_batches=1)[0])
    assert start["around.embedding_distill.weight"].shape == (40, 32)
    assert not torch.equal(start["around.embedding_distill.weight"], after["around.embedding_distill.weight"])


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_activations_change_nothing(techniques, at_once, checkpointing):
    recipe = recipe_of(techniques, {"type": "single"}, num_micro_batches=2, world_size=1)
    train_section = recipe.train.model_copy(update={"activation_checkpointing": checkpointing})
    engine, loop = train(recipe.model_copy(update={"train": train_section}), ONE, num_micro_batches=2)
    losses = loop.meter.record(step=2, tokens=1, lr=0.0, tokens_per_step=1, metrics={}).losses
    equal((full_parameters(engine), losses), at_once)
