"""Compiled blocks: one graph for a layer that trains and one for a layer that rests, whatever is drawn."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from tests.contract_models import MODEL
from tests.contract_training import full_parameters, recipe_of, train


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def trained(**changes):
    given = recipe_of((), {"type": "single"}, "", 1).model_dump()
    given["techniques"] = [{"type": "lisa", "num_layers": 1, "every_steps": 1}]
    given["model"]["config"] = MODEL | {"num_hidden_layers": 4}
    given["train"] |= changes
    recipe = Recipe.model_validate(given)
    engine, loop = train(recipe, ONE)
    drawn = [loop.step_rules[0].schedule.drawn([f"model.layers.{n}" for n in range(4)], step) for step in range(3)]
    assert len({layer for layers in drawn for layer in layers}) == 2  # one is drawn again
    return full_parameters(engine)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_number_of_graphs_does_not_grow_with_draws(monkeypatch, checkpointing):
    expected = trained()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    found = trained(compile=True, activation_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
