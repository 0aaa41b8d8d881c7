"""`leanmill schema`: the JSON schema of recipes, so that editors complete and check them."""

from __future__ import annotations

import argparse
import json


def run(args: argparse.Namespace) -> int:
    """Write the schema to `args.out`, or to stdout."""
    from pathlib import Path

    from leanmill.recipe.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if args.out is None:
        print(text)
    else:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
        print(f"wrote {args.out}; editors: put `# yaml-language-server: $schema={args.out}` on a recipe's first line")
    return 0
