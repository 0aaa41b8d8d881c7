"""The end of weight decay and the lower peak reach the optimizer under every engine."""

import pytest
import torch
import torch.distributed as dist

from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from tests.contract_cases import ENGINES
from tests.contract_training import full_parameters, recipe_of, train
from tests.distributed import run_ranks
from tests.trainer.test_loop import IdleEngine, Run


def parameters(engine, schedule, world_size=1):
    """After three steps, each of which decays weights by a fifth where it decays them."""
    rank = dist.get_rank() if world_size > 1 else 0
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    raw = recipe_of((), engine, "", world_size).model_dump(mode="json")
    raw["optimizer"]["weight_decay"] = 20.0
    raw["schedule"] |= schedule
    return full_parameters(train(Recipe.model_validate(raw), ranks)[0])


SCHEDULE = {"weight_decay_until": 0.5, "drop_at": 0.5, "drop_factor": 0.5}


def test_two_of_three_steps_decay():
    decayed, ended = (
        parameters({"type": "single"}, schedule) for schedule in ({"drop_at": 0.5, "drop_factor": 0.5}, SCHEDULE)
    )
    name = "model.embed_tokens.weight"
    # The last step multiplies by 1 - lr x decay = 1 - 0.005 x 20, and what moves it is the same.
    ratio = decayed[name].norm() / ended[name].norm()
    assert 0.88 < ratio < 0.92


@pytest.mark.parametrize(
    "name", ["zero1", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES if name != "zero1")]
)
def test_two_ranks_equal_one_process(name):
    expected = parameters({"type": "single"}, SCHEDULE)
    for got in run_ranks(parameters, 2, ENGINES[name], SCHEDULE, 2)[:1]:
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=key: f"{n}: {m}")


def test_the_loop_writes_both_and_leaves_their_peaks(monkeypatch):
    seen = []
    step = IdleEngine.step
    monkeypatch.setattr(
        IdleEngine, "step", lambda self, skip: (seen.append(dict(self.param_groups[0])), step(self, skip))
    )
    run = Run()
    schedule = {"type": "constant", "warmup_steps": 0, "drop_at": 0.5, "drop_factor": 0.5, "weight_decay_until": 0.7}
    recipe = run.loop.recipe
    run.loop.recipe = recipe.model_copy(update={"schedule": type(recipe.schedule)(**schedule)})
    run.go()
    assert [group["lr"] for group in seen] == [1.0] * 5 + [0.5] * 5
    assert [group["weight_decay"] for group in seen] == [0.1] * 7 + [0.0] * 3
    assert all(group["initial_weight_decay"] == 0.1 for group in seen)
