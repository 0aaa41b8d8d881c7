"""`leanmill data`: look at what a recipe trains on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console

    from leanmill.data.preview import RowPreview


def run(args: argparse.Namespace) -> int:
    """Print the first rows that `args.recipe` trains on, documents apart and what is predicted marked."""
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.local_files import check_files

    recipe = load_recipe(args.recipe, args.overrides)
    check_files(recipe)
    from rich.console import Console

    from leanmill.data.build import build_tokenizer, build_train_data
    from leanmill.data.preview import preview_rows

    tokenizer = build_tokenizer(recipe.data, seed=recipe.seed)
    data = build_train_data(recipe.data, tokenizer, seed=recipe.seed)
    console = Console(highlight=False, soft_wrap=True)
    rows_per_step = recipe.batch.tokens_per_step // recipe.data.sequence_length
    print(data.describe())
    for line in data.warnings(0):
        print(f"WARNING: {line}")
    print(f"predicted tokens are {'green, others dim' if console.is_terminal else 'between « and »'}")
    for number, row in enumerate(preview_rows(data.next_rows(args.rows), tokenizer)):
        _show(console, number, number // rows_per_step + 1, row)
    return 0


def _show(console: Console, number: int, step: int, row: RowPreview) -> None:
    from rich.text import Text

    console.print(f"\nrow {number} of step {step}: {row.facts()}", style="bold")
    document = 0
    text = Text()
    for piece in row.pieces:
        if piece.document != document:
            document = piece.document
            text.append(f"\n---- document {document + 1} ----\n", style="bold cyan")
        if console.is_terminal:
            text.append(piece.text, style="green" if piece.is_predicted else "dim")
        else:
            text.append(f"«{piece.text}»" if piece.is_predicted else piece.text)
    console.print(text)
