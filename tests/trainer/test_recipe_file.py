"""The recipe of a run folder, and those before it."""

from __future__ import annotations

from leanmill.recipe.io import load_recipe
from leanmill.trainer.recipe_file import write_recipe
from tests.trainer.fake_run import fake_recipe


def test_earlier_recipes_stay(tmp_path):
    recipes = [fake_recipe(tmp_path, techniques=names) for names in ((), (), ("ternary",), ("nm_sparsity",), ())]
    for recipe in recipes:
        write_recipe(tmp_path, recipe)
    names = ["recipe.1.yaml", "recipe.2.yaml", "recipe.3.yaml", "recipe.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    techniques = [[t.type for t in load_recipe(tmp_path / name).techniques] for name in names]
    assert techniques == [[], ["ternary"], ["nm_sparsity"], []]
