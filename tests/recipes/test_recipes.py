from pathlib import Path

import pytest

from leanmill.recipe.explain import explain
from leanmill.recipe.io import load_recipe, resolved_yaml


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_the_promised_recipes_exist():
    promised = {"quickstart", "pretrain_1b", "sparse_finetune", "ternary_pretrain", "lora_sft", "distill_student"}
    promised |= {"prune_and_retrain", "moe_quickstart", "moe_pretrain"}
    promised |= {"learned_mask"}
    assert promised <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_loads_explains_and_round_trips(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem.replace("_", "-")
    copy = tmp_path / "resolved.yaml"
    copy.write_text(resolved_yaml(recipe))
    assert load_recipe(copy) == recipe
    text = explain(recipe, [ranks for ranks in (1, 2) if ranks % recipe.layout.ep == 0])
    assert "impossible" not in text
    for one in (recipe, *recipe.training_phases()):
        for technique in one.techniques:
            assert technique.type in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_is_commented_and_says_how_to_start_it(path):
    head = path.read_text().split("\n\n")[0]
    assert f"--config recipes/{path.name}" in path.read_text()
    assert head.startswith("# ")


@pytest.mark.parametrize("path", [p for p in RECIPES if load_recipe(p).model.config is not None], ids=lambda p: p.stem)
def test_models_given_inline_can_be_planned_on_8_ranks_or_2(path):
    from leanmill.phases.models import models_to_come, training_recipes
    from leanmill.plan.plan import plan

    # Teachers of the recipe itself would be fetched; those of its phases are made by earlier ones.
    recipe = load_recipe(path, ["techniques=[]"])
    world_size = 8 if recipe.batch.tokens_per_step >= 8 * recipe.batch.tokens_per_micro_batch else 2
    for one in training_recipes(recipe) or [recipe]:
        result = plan(one, world_size, to_come=models_to_come(recipe))
        assert result.num_parameters > 1e6
        assert result.peak_bytes < 80 * 2**30


def test_moe_pretrain_has_1b_active_of_7b():
    from leanmill.plan.plan import plan

    result = plan(load_recipe(next(path for path in RECIPES if path.stem == "moe_pretrain")), 8)
    assert result.num_parameters == pytest.approx(6.9e9, rel=0.01)
    assert result.num_active == pytest.approx(1.3e9, rel=0.02)
