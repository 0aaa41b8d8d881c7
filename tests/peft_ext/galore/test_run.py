"""Runs in subspaces: resumed bitwise between two and at one, compiled, exported."""

from __future__ import annotations

import shutil
from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from leanmill.checkpoint.reading import read_full_state
from leanmill.export.run import export_model
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run
from tests.contract_training import full_parameters, recipe_of, train
from tests.sparse.tiny_runs import recipe, with_text


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
GALORE = {"type": "galore", "rank": 4, "every_steps": 2, "natural": {"history": 2}}
LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_text(tmp_path_factory.mktemp("galore"))
    run(recipe(folder, "whole", GALORE))
    return folder


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resume_is_bitwise_between_subspaces_and_at_one(folder, step):
    shutil.copytree(folder / "whole", folder / f"from-{step}")
    for later in range(step + 1, 9):
        shutil.rmtree(folder / f"from-{step}/checkpoints/step-{later:08d}")
    assert run(recipe(folder, f"from-{step}", GALORE)).step == 8
    for part in ("model", "optimizer"):
        expected, got = (read_full_state(folder / name / LAST, part) for name in ("whole", f"from-{step}"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_the_export_is_the_weight_that_was_trained(folder):
    export_model(folder / "whole" / LAST, folder / "plain")
    weights, saved = load_file(folder / "plain/model.safetensors"), read_full_state(folder / "whole" / LAST)
    name = "model.layers.0.mlp.up_proj"
    coordinates, basis = (saved[f"{name}.stages.delta.{part}"] for part in ("coordinates", "basis"))
    assert not any(".stages." in key for key in weights)
    torch.testing.assert_close(weights[f"{name}.weight"], saved[f"{name}.weight"] + coordinates @ basis)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_see_gradients_too(monkeypatch, checkpointing):
    def trained(**changes):
        given = recipe_of(("galore",), {"type": "single"}, "", 1).model_dump()
        given["train"] |= changes
        return full_parameters(train(Recipe.model_validate(given), ONE)[0])

    expected = trained()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    found = trained(compile=True, activation_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
