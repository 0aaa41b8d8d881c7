"""`leanmill train`, and what `launch/train.py` calls on every rank."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from leanmill.cli.accelerate_launch import check_accelerate, parent_command
from leanmill.core.errors import EXIT_INTERRUPTED
from leanmill.core.redact import redact


if TYPE_CHECKING:
    from leanmill.recipe.root import Recipe


def run(args: argparse.Namespace) -> int:
    """Train `args.recipe` with `args.overrides`."""
    return train(args.recipe, args.overrides)


def train(path: str, overrides: Sequence[str]) -> int:
    """Load a recipe, train it and say on rank 0 where the results are.

    Returns:
        0, or 130 after Ctrl-C; errors are raised.
    """
    # Everything that can be wrong on paper is found before torch is imported.
    recipe = _load(path, overrides)
    _log_from_rank_0()
    if recipe.phases:
        from leanmill.phases.run import run as run_recipe
    else:
        from leanmill.trainer.run import run as run_recipe

    try:
        result = run_recipe(recipe)
    except KeyboardInterrupt:
        _quit()
    if result.rank == 0:
        if recipe.phases:
            from leanmill.checkpoint.phases import phase_folders
            from leanmill.report.phases import table_of_phases

            for line in table_of_phases(phase_folders(result.run_dir)):
                print(line)
        # The path of the report was printed by the progress observer, just above.
        skipped = f", {result.num_skipped} of them skipped as non-finite" if result.num_skipped else ""
        print(f"{result.status} after {result.step} steps{skipped}; results in {result.run_dir.resolve()}", flush=True)
    return EXIT_INTERRUPTED if result.interrupted else 0


def _quit() -> NoReturn:
    """Leave at once: the interpreter's own exit waits for a thread that may be writing a checkpoint."""
    if os.environ.get("RANK", "0") == "0":
        print("error: interrupted", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def _load(path: str, overrides: Sequence[str]) -> Recipe:
    from leanmill.core.errors import ConfigError
    from leanmill.export.run_models import with_models_of_runs
    from leanmill.recipe.io import load_recipe
    from leanmill.recipe.local_files import check_files

    try:
        recipe = load_recipe(path, overrides)
        check_files(recipe)
        if any(key.startswith("ACCELERATE_") for key in os.environ):
            check_accelerate(recipe, os.environ, parent_command())
    except ConfigError:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            # The first rank of this machine read the same file and says it; an empty message prints nothing.
            raise ConfigError("") from None
        raise
    return with_models_of_runs(recipe)


def _log_from_rank_0() -> None:
    """Show the project's INFO lines on rank 0 and only warnings elsewhere."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    stamp = "" if sys.stderr.isatty() else "%(asctime)s "
    form = f"{stamp}{f'[rank {rank}] ' if rank else ''}%(levelname)s: %(message)s"
    handler.setFormatter(_Redacting(form, datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("leanmill").setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
