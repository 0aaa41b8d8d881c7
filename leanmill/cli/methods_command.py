"""`leanmill methods`: the techniques, where they live and where they come from."""

from __future__ import annotations

import argparse

from leanmill.core.registry import known_techniques


def run(args: argparse.Namespace) -> int:
    """Print one block a technique; imports none of them."""
    width = max(map(len, known_techniques()))
    for name, entry in known_techniques().items():
        home = entry.target.partition(":")[0].removesuffix(".config")
        print(f"{name:<{width}}  {entry.summary}")
        print(f"{'':<{width}}  paper: {entry.paper}")
        print(f"{'':<{width}}  home: {home}")
    return 0
