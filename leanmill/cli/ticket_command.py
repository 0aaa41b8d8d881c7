"""`leanmill ticket`: what each layer of a trained lottery ticket owes to its values and to its mask."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Print by how much the loss rises when a block or layer gets earlier, drawn or shuffled values."""
    from leanmill.core.errors import ConfigError
    from leanmill.parallel.launch import finish, init_processes
    from leanmill.recipe.compress import CalibratedRecipe
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.sections import ClusterConfig
    from leanmill.trainer.passes.tickets import study_ticket

    recipe = load_recipe(args.recipe, args.overrides, root=CalibratedRecipe)
    earlier = None if args.earlier is None else Path(args.earlier)
    if earlier is not None and not (earlier / "config.json").is_file():
        raise ConfigError(f"--earlier {earlier} is no model folder; give one that leanmill export --to hf wrote")
    ranks = init_processes(recipe.device, ClusterConfig())
    try:
        study = study_ticket(recipe, ranks, earlier=earlier, by=args.by)
    finally:
        finish()
    if ranks.rank:
        return 0
    changes = list(study.layers[0].rises) if study.layers else []
    width = max((len(layer.name) for layer in study.layers), default=5)
    print(f"loss {study.loss:.4f} nats a token; rises where one {args.by} at a time has other values:")
    print(f"{args.by:{width}}  zeros" + "".join(f"  {change:>8}" for change in changes))
    for layer in study.layers:
        rises = "".join(f"  {layer.rises[change]:+8.4f}" for change in changes)
        print(f"{layer.name:{width}}  {layer.zero_fraction:5.1%}{rises}")
    return 0
