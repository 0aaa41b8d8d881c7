"""Adapters that begin beside codes of several forms, trained on two ranks as by one process."""

import json

import pytest
import torch
import torch.distributed as dist

from leanmill.models.config import ModelConfig
from leanmill.models.stored_adapter import stored_adapter
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.passes.run import compress
from tests.contract_cases import ENGINES
from tests.contract_training import full_parameters, recipe_of, train
from tests.distributed import run_ranks
from tests.trainer.passes.test_run import recipe, save_model, text  # noqa: F401  (a fixture)


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def stored_recipe(engine, folder, world_size):
    given = recipe_of(("lora",), engine, "", world_size).model_dump(mode="json", exclude_unset=True)
    given["model"] = {"path": str(folder), "frozen_dtype": "stored"}
    given["techniques"] = [{"type": "lora", "rank": 3, "alpha": 6, "init": "stored"}]
    return Recipe.model_validate(given)


def on_two_ranks(engine, folder):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    found = full_parameters(train(stored_recipe(engine, folder, world_size), ranks)[0])
    return found if rank == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ENGINES)
def test_two_ranks_equal_one_process(engine_name, text, tmp_path):  # noqa: F811
    save_model(tmp_path / "in", vocab_size=61, num_hidden_layers=2)
    parts = {"type": "lq_lora", "rank": 3, "bits": [2, 3, 4, 8], "average_bits": 4.4, "weighted": False}
    compress(recipe(tmp_path / "in", text, tmp_path, parts), tmp_path / "parts")
    kinds = json.loads((tmp_path / "parts/leanmill.json").read_text())["kept_as"]
    assert len(set(kinds.values())) > 1
    expected = full_parameters(train(stored_recipe({"type": "single"}, tmp_path / "parts", 1), ONE)[0])
    found = run_ranks(on_two_ranks, 2, ENGINES[engine_name], tmp_path / "parts", timeout_seconds=200)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=1e-4, atol=2e-5)
    begun = stored_adapter(ModelConfig(path=str(tmp_path / "parts")))
    for name, stored in begun.items():
        a = next(value for key, value in expected.items() if key.startswith(name) and key.endswith("lora_A"))
        delta = (a - stored.read().a * 0.5**0.5).abs().max()
        assert 0 < float(delta) < 0.04, name  # three steps, each about the learning rate
