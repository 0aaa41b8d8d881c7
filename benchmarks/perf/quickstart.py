"""The quick start as a user runs it: two ranks, real text, bits per byte against an order-0 byte model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import conditions, write_result


ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="recipe overrides, a.b=c")
    overrides = parser.parse_args().overrides
    measured_under = conditions()
    run_dir = Path(tempfile.mkdtemp(prefix="leanmill-quickstart-"))
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [
        torchrun,
        "--nproc-per-node",
        "2",
        ROOT / "launch/train.py",
        "--config",
        ROOT / "recipes/quickstart.yaml",
    ]
    started = time.perf_counter()
    subprocess.run([*map(str, command), f"run_dir={run_dir}", *overrides], check=True, cwd=run_dir)
    wall = time.perf_counter() - started
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    domains = [record for record in records if record["kind"] == "eval"][-1]["domains"]
    figures = {
        "wall_seconds": wall,
        "tokens": steps[-1]["tokens"],
        "tokens_per_second_median": sorted(s["tokens_per_second"] for s in steps)[len(steps) // 2],
        "bits_per_byte": {name: score["bits_per_byte"] for name, score in domains.items()},
        "order0_bits_per_byte": {name: score["order0_bits_per_byte"] for name, score in domains.items()},
        "share_of_order0": {n: s["bits_per_byte"] / s["order0_bits_per_byte"] for n, s in domains.items()},
    }
    write_result("quickstart", figures, measured_under)


if __name__ == "__main__":
    main()
