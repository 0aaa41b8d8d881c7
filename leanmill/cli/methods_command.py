"""`leanmill methods`: the techniques, where they live and where they come from."""

from __future__ import annotations

import argparse

from leanmill.core.registry import TECHNIQUES


def run(args: argparse.Namespace) -> int:
    """Print one block a technique; imports none of them."""
    width = max(map(len, TECHNIQUES))
    for name, entry in TECHNIQUES.items():
        home = entry.target.partition(":")[0].removesuffix(".config")
        print(f"{name:<{width}}  {entry.summary}")
        print(f"{'':<{width}}  paper: {entry.paper}")
        print(f"{'':<{width}}  home: {home}")
    return 0
