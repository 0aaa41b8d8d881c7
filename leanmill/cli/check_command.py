"""`leanmill check`: validate a recipe and explain it."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Validate `args.recipe` with `args.overrides`, look for its files and explain it."""
    from leanmill.recipe.explain import check_files, explain
    from leanmill.recipe.io import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    check_files(recipe)
    print(explain(recipe, args.ranks))
    return 0
