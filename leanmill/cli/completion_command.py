"""`leanmill completion`: a script with which a shell completes verbs and options."""

from __future__ import annotations

import argparse

from leanmill.cli.main import build_parser


def run(args: argparse.Namespace) -> int:
    """Write the script of `args.shell` to stdout."""
    import shtab

    print(shtab.complete(build_parser(), shell=args.shell))
    return 0
