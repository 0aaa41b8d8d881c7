"""`leanmill report`: rebuild the HTML report of a run from what it logged."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Write `report.html` of `args.run_dir`, or of each of its phases that trained."""
    from leanmill.checkpoint.phases import phase_folders
    from leanmill.core.errors import ConfigError

    run_dir = Path(args.run_dir)
    folders = [folder for folder in (run_dir, *phase_folders(run_dir)) if (folder / "metrics.jsonl").is_file()]
    if not folders:
        raise ConfigError(f"{run_dir} has no metrics.jsonl, so it is no run; name a folder such as runs/quickstart")
    from leanmill.report.page.html import write_report

    for folder in folders:
        print(f"report: {write_report(folder).resolve()}")
    return 0
