"""`leanmill data`: look at what a recipe trains on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console

    from leanmill.data.preview import RowPreview
    from leanmill.recipe.root import Recipe


def run(args: argparse.Namespace) -> int:
    """Print the first rows that `args.recipe` trains on, documents apart and what is predicted marked.

    Of a recipe with phases, those of each phase that trains; of phases with the same rows once. Or tokenise its data,
    or score what is tokenised.
    """
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.local_files import check_files

    recipe = load_recipe(args.recipe, args.overrides)
    if args.action == "score":
        return _score(recipe, args)
    check_files(recipe)
    if args.action == "prepare":
        return _prepare(recipe, args.out, args.shard_tokens)
    for phases, one in _with_other_rows(recipe):
        if phases:
            print(f"{'phase' if len(phases) == 1 else 'phases'} {', '.join(phases)}")
        _show_rows(one, args.rows)
    return 0


def _prepare(recipe: Recipe, out: str | None, shard_tokens: int) -> int:
    from leanmill.core.errors import ConfigError
    from leanmill.core.paths import expand_user
    from leanmill.data.prepare import prepare_data

    if out is None:
        raise ConfigError("data prepare writes a folder; name it: --out prepared")
    found = prepare_data(recipe.data, expand_user(out), seed=recipe.seed, shard_tokens=shard_tokens)
    kept = f" ({found.num_kept:,} were there)" if found.num_kept else ""
    print(f"{found.folder}: {found.num_tokens:,} tokens in {found.num_shards:,} shards{kept}")
    print(f"train on it: data.source={{type: prepared, path: {found.folder}}} and no data.tokenizer")
    return 0


def _score(recipe: Recipe, args: argparse.Namespace) -> int:
    from leanmill.core.errors import ConfigError
    from leanmill.core.paths import expand_user
    from leanmill.evaluate.document_scores import model_folder, score_documents
    from leanmill.parallel.launch import finish, init_processes

    if args.out is None or args.teacher_model is None or args.reference_model is None:
        raise ConfigError("data score compares two models: --teacher MODEL --reference MODEL --out scores")
    out, teacher, reference = (
        expand_user(args.out),
        model_folder(args.teacher_model, "--teacher"),
        model_folder(args.reference_model, "--reference"),
    )
    ranks = init_processes(recipe.device, recipe.cluster)
    try:
        found = score_documents(
            recipe.data,
            out,
            teacher=teacher,
            reference=reference,
            device=ranks.device,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
    finally:
        finish()
    kept = f" ({found.num_kept:,} were there)" if found.num_kept else ""
    print(f"{out}: {found.num_documents:,} documents scored in {found.num_shards:,} shards{kept}")
    print(f"train on the best half: data.source.scores={out} data.source.kept_share=0.5")
    return 0


def _with_other_rows(recipe: Recipe) -> list[tuple[list[str], Recipe]]:
    """Each recipe whose rows differ from the others', after the names of the phases that it stands for."""
    from leanmill.recipe.phases import phase_names

    names = [name for name, phase in zip(phase_names(recipe.phases), recipe.phases, strict=True) if phase.trains]
    if not names:
        return [([], recipe)]
    found: list[tuple[list[str], Recipe]] = []
    for name, one in zip(names, recipe.training_phases(), strict=True):
        alike = [phases for phases, other in found if _rows_of(other) == _rows_of(one)]
        if alike:
            alike[0].append(name)
        else:
            found.append(([name], one))
    return found


def _rows_of(recipe: Recipe) -> tuple[object, ...]:
    """What decides which rows there are, and in which steps."""
    return recipe.data, recipe.seed, recipe.batch.tokens_per_step


def _show_rows(recipe: Recipe, num_rows: int) -> None:
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
    rows = preview_rows(data.next_rows(num_rows), tokenizer, is_masked=recipe.data.task == "masked")
    for number, row in enumerate(rows):
        _show(console, number, number // rows_per_step + 1, row)


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
