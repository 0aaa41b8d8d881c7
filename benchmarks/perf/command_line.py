"""Start-up time of the commands a user waits for, whole processes, median of several runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import conditions, write_result


ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "help": ["--help"],
    "check": ["check", str(ROOT / "recipes" / "quickstart.yaml")],
}


def seconds_of(arguments: list[str], runs: int = 7) -> list[float]:
    """Wall time of `leanmill ARGUMENTS`, after one run that warms the file cache."""
    leanmill = Path(sys.executable).with_name("leanmill")
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run([leanmill, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return times[1:]


def main() -> None:
    measured_under = conditions()
    times = {name: seconds_of(arguments) for name, arguments in COMMANDS.items()}
    figures = {f"{name}_seconds_median": statistics.median(values) for name, values in times.items()}
    write_result("command_line", figures, measured_under)


if __name__ == "__main__":
    main()
