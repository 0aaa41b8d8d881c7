"""One rank of a run: what torchrun starts, as `launch/train.py` or `-m leanmill.cli.rank`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of one rank."""
    parser = argparse.ArgumentParser(description="Train a recipe; start it with torchrun.")
    parser.add_argument("--config", required=True, help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key, e.g. train.steps=100")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit code."""
    from leanmill.parallel.launcher_watch import end_with_launcher

    end_with_launcher()
    from leanmill.cli.main import guarded
    from leanmill.cli.train_command import train

    args = parse_args(argv)
    return guarded(lambda: train(args.config, args.overrides), debug=args.debug)


def leave(code: int) -> NoReturn:
    """Exit at once, without the interpreter's teardown.

    Ranks that ran collectives inside autograd die with SIGABRT at interpreter exit about one time
    in ten, which torchrun would count as a failure of a finished job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_and_leave() -> NoReturn:
    """Train and leave with the exit code."""
    try:
        code = main()
    except SystemExit as stop:  # argparse: usage errors and --help
        code = stop.code if isinstance(stop.code, int) else 1
    leave(code)


if __name__ == "__main__":
    run_and_leave()
