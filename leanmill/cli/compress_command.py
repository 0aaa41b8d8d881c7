"""`leanmill compress`: one-shot pruning and quantisation of a model folder, a block at a time."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Run the passes of `args.recipe` and write the model to `args.out`."""
    from leanmill.core.folders import check_is_new
    from leanmill.recipe.compress import CompressRecipe
    from leanmill.recipe.io import load_recipe

    recipe = load_recipe(args.recipe, args.overrides, root=CompressRecipe)
    out = Path(args.out)
    check_is_new(out)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("leanmill").setLevel(logging.INFO)
    from leanmill.trainer.passes.run import compress

    reports = compress(recipe, out)
    for report in reports:
        print(report)
    print(f"wrote {out.resolve()}")
    return 0
