"""`leanmill report`: the HTML report of a run, of several beside each other, or of one that goes on."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from leanmill.core.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    """Write `report.html` of a run and its phases, a comparison of several runs, or serve a report that goes on.

    Raises:
        ConfigError: A folder is no run, or options do not go together.
    """
    run_dirs = [Path(folder) for folder in args.run_dirs]
    if args.live:
        return _serve(run_dirs, args)
    if len(run_dirs) == 1 and args.out is None:
        return _rebuild(run_dirs[0])
    for folder in run_dirs:
        _records(folder)
    from leanmill.report.page.compare import write_comparison

    print(f"comparison: {write_comparison(run_dirs, Path(args.out or 'comparison.html')).resolve()}")
    return 0


def _records(folder: Path) -> list[Path]:
    """The folder and those of its phases, where they have records."""
    from leanmill.checkpoint.phases import phase_folders

    found = [one for one in (folder, *phase_folders(folder)) if (one / "metrics.jsonl").is_file()]
    if not found:
        raise ConfigError(f"{folder} has no metrics.jsonl, so it is no run; name a folder such as runs/quickstart")
    return found


def _rebuild(run_dir: Path) -> int:
    from leanmill.report.page.html import write_report
    from leanmill.report.phases import table_of_phases

    folders = _records(run_dir)
    for folder in folders:
        print(f"report: {write_report(folder).resolve()}")
    for line in table_of_phases(folders):
        print(line)
    return 0


def _serve(run_dirs: list[Path], args: argparse.Namespace) -> int:
    if len(run_dirs) != 1 or args.out is not None:
        raise ConfigError("--live serves the report of one run; name one folder and leave --out away")
    run_dir = _records(run_dirs[0])[-1]
    from leanmill.report.live import server
    from leanmill.trainer.run_lock import is_held

    try:
        served = server(
            run_dir,
            port=args.port,
            refresh_seconds=args.refresh_seconds,
            is_training=lambda: is_held(run_dirs[0]),
        )
    except OSError as error:
        raise ConfigError(f"--port {args.port} is taken; give another, or 0 for a free one") from error
    with served, suppress(KeyboardInterrupt):
        if not is_held(run_dirs[0]):
            print("no process trains this run: the page shows what it left and does not refresh itself")
        print(f"report: http://{served.server_address[0]!s}:{served.server_port}/ (Ctrl-C ends it)", flush=True)
        served.serve_forever()
    return 0
