"""`recipe.yaml` of a run folder, and the recipes the run was trained with before."""

from __future__ import annotations

import itertools
from pathlib import Path

from leanmill.recipe.io import resolved_yaml
from leanmill.recipe.root import Recipe
from leanmill.report.files import write_atomically


FILE_NAME = "recipe.yaml"


def write_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Write the resolved recipe; one that was there and differs stays as `recipe.1.yaml`, `recipe.2.yaml`, ...

    Raises:
        RunError: The folder cannot be written.
    """
    path, text = run_dir / FILE_NAME, resolved_yaml(recipe)
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else text
    if before != text:
        names = (run_dir / f"recipe.{number}.yaml" for number in itertools.count(1))
        write_atomically(next(name for name in names if not name.exists()), before)
    write_atomically(path, text)
