"""Phases whose passes change the architecture: what comes after them is checked and trained as what they leave."""

import shutil

import pytest
import torch

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.phases.check import check_phases
from leanmill.phases.models import training_recipes
from leanmill.phases.run import run
from leanmill.plan.plan import plan
from tests.data.samples import write_texts
from tests.kills import records
from tests.phases.test_run import assert_equal, recipe, weights


UPCYCLE = {"type": "upcycle", "num_experts": 4, "top_k": 2, "granularity": 2}
BALANCE = {"type": "router_balance"}
TRAIN = {"train.steps": 3, "eval.at_start": True, "techniques": [BALANCE], "checkpoint.every_steps": 1}
PHASES = (
    {"name": "dense", "overrides": {"train.steps": 3}},
    {"name": "upcycle", "passes": [UPCYCLE]},
    {"name": "experts", "keep": ["data"], "overrides": TRAIN},
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surgery")
    write_texts(folder / "a.jsonl", 60)
    return folder


def test_a_dense_model_is_upcycled_and_trained_and_the_training_resumes(home, tmp_path):
    result = run(recipe(home, tmp_path / "run", *PHASES))
    assert (result.status, result.step) == ("finished", 6)
    dense, experts = tmp_path / "run/phases/01-dense", tmp_path / "run/phases/03-experts"
    end = [record["domains"]["all"]["loss"] for record in records(dense, "eval")][-1]
    start = next(record["domains"]["all"]["loss"] for record in records(experts, "eval"))
    assert start == pytest.approx(end, rel=1e-5)
    before = weights(experts)
    assert before["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 16)
    shutil.rmtree(experts / "checkpoints" / "step-00000003")
    (experts / "done.json").unlink()
    assert run(recipe(home, tmp_path / "run", *PHASES)).step == 6
    assert_equal(weights(experts), before)
    written = next(tensor for name, tensor in before.items() if name.endswith("gate.weight"))
    assert not torch.equal(written[0], written[1]), "shards of one copy go their own ways"


def test_later_phases_are_checked_as_what_the_passes_leave(home, tmp_path, monkeypatch):
    good = recipe(home, tmp_path / "run", *PHASES)
    check_phases(good)
    planned = [plan(one, 1) for one in training_recipes(good)]
    assert planned[1].num_parameters > planned[0].num_parameters
    assert planned[1].num_active < planned[1].num_parameters
    too_early = ({"name": "dense", "overrides": {"train.steps": 3, "techniques": [BALANCE]}}, *PHASES[1:])
    with pytest.raises(ConfigError, match=r"phases\.0 \(dense\).*router"):
        check_phases(recipe(home, tmp_path / "run", *too_early))
    second = {"name": "again", "passes": [UPCYCLE]}
    with pytest.raises(ConfigError, match=r"phases\.2 \(again\): upcycle.*'mixtral'"):
        check_phases(recipe(home, tmp_path / "run", *PHASES[:2], second))
    with pytest.raises(ValueError, match="rewind_to needs the tensors of the earlier model"):
        recipe(home, tmp_path / "run", PHASES[0], PHASES[1] | {"rewind_to": "dense"})


def test_the_shipped_recipe_is_explained_and_planned(capsys):
    assert main(["check", "recipes/moe_upcycle.yaml"]) == 0
    assert "a mixture of experts that computes the same" in capsys.readouterr().out
    assert main(["plan", "recipes/moe_upcycle.yaml", "--json"]) == 0
    assert capsys.readouterr().out.count('"num_active"') == 2
