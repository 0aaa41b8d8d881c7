"""`leanmill check`: validate a recipe and explain it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from leanmill.core.errors import EXIT_RUN


if TYPE_CHECKING:
    from rich.table import Table

    from leanmill.recipe.root import Recipe
    from leanmill.trainer.parity.check import Checked


def run(args: argparse.Namespace) -> int:
    """Validate `args.recipe` with `args.overrides`, look for its files, try its model and explain it; or compare ranks.

    Returns:
        0, or 1 where ranks train another model than one process (`args.parity`).
    """
    from leanmill.recipe.explain import explain
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.local_files import check_files
    from leanmill.recipe.on_this_machine import local_model
    from leanmill.trainer.verdicts import is_known_good, remember

    recipe = load_recipe(args.recipe, args.overrides)
    if args.parity:
        return _compare_ranks(recipe)
    check_files(recipe)
    if recipe.phases:
        from leanmill.phases.check import check_phases

        check_phases(recipe)
    elif local_model(recipe.model) is not None and not is_known_good(recipe):
        from leanmill.trainer.trial import try_model

        try_model(recipe)
        remember(recipe)
    plan = _derived_plan(recipe)
    print("\n".join([explain(recipe, args.ranks), *plan]))
    return 0


def _derived_plan(recipe: Recipe) -> list[str]:
    """Say which matmuls ranks share of a family that has no plan of its own, where its model is on this machine."""
    from leanmill.recipe.on_this_machine import local_model

    model = local_model(recipe.model)
    if recipe.layout.tp == 1 or recipe.phases or model is None:
        return []
    from leanmill.parallel.tensor_plan import derived_lines
    from leanmill.plan.subject import plain_model

    found = derived_lines(plain_model(recipe.model_copy(update={"model": model})), recipe.layout.tp)
    title = f"matmuls that {recipe.layout.tp} ranks share, derived since transformers has no plan for this family:"
    return [title, *(f"  {line}" for line in found)] if found else []


def _compare_ranks(recipe: Recipe) -> int:
    from rich.console import Console

    from leanmill.trainer.parity.check import check_parity

    console, num_failed = Console(highlight=False), 0
    for checked in check_parity(recipe):
        num_failed += bool(checked.failed)
        console.print(_table(checked))
        for one in checked.failed:
            where = "weights at the end" if one.quantity == "weight" else f"step {one.step + 1}, {one.quantity}"
            told = f"{where} of {one.family}: off by {one.error:.1e}, ratio {one.ratio:.6g}: {one.reason}"
            console.print(f"  {told}", markup=False, soft_wrap=True)
        verdict = "another model than one process" if checked.failed else "what one process trains"
        console.print(f"{checked.title}: the ranks train {verdict}", markup=False, soft_wrap=True)
    return EXIT_RUN if num_failed else 0


def _table(checked: Checked) -> Table:
    """How far ranks and one process are apart, a line a family of parameters; of weights their change in 3 steps."""
    from rich.table import Table

    found = {(one.quantity, one.family): one for one in checked.every}
    table = Table()
    for column in ("", "off by", "ratio", "weights off by", "ratio"):
        table.add_column(column, no_wrap=True)
    for (quantity, family), one in found.items():
        if quantity == "weight":
            continue
        weight = found.get(("weight", family)) if quantity == "gradient" else None
        numbers = [f"{one.error:.1e}", f"{one.ratio:.6g}"]
        numbers += [] if weight is None else [f"{weight.error:.1e}", f"{weight.ratio:.6g}"]
        table.add_row({"gradient": f"gradient, {family}", "loss": f"loss, {family}"}.get(quantity, quantity), *numbers)
    return table
