"""`leanmill report`: rebuild the HTML report of a run from what it logged."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Write `report.html` of `args.run_dir`."""
    from leanmill.core.errors import ConfigError

    run_dir = Path(args.run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(f"{run_dir} has no metrics.jsonl, so it is no run; name a folder such as runs/quickstart")
    from leanmill.report.page.html import write_report

    print(f"report: {write_report(run_dir).resolve()}")
    return 0
