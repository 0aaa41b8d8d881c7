"""`leanmill check`: validate a recipe and explain it."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Validate `args.recipe` with `args.overrides`, look for its files, try its model and explain it."""
    from leanmill.recipe.explain import explain
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.local_files import check_files
    from leanmill.recipe.on_this_machine import local_model
    from leanmill.trainer.verdicts import is_known_good, remember

    recipe = load_recipe(args.recipe, args.overrides)
    check_files(recipe)
    if recipe.phases:
        from leanmill.phases.check import check_phases

        check_phases(recipe)
    elif local_model(recipe.model) is not None and not is_known_good(recipe):
        from leanmill.trainer.trial import try_model

        try_model(recipe)
        remember(recipe)
    print(explain(recipe, args.ranks))
    return 0
