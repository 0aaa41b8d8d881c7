"""Kernels on one GPU: against measured copy bandwidth, measured matmul rate, and named peers.

Prints the ceilings of this GPU first, then a table. Groups list their cases in
`kernels_<group>.py` as `cases(device)`; the whole takes a few minutes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_case import GpuCase


GROUPS = ("nm_mask", "fake_quant", "packing", "experts", "losses")
RESULT = "kernels_gpu.json"
LIMIT_SECONDS = 300.0
"""Cases after this are listed as not run, so that the table is always printed."""


def seconds_of(call: Callable[[], object], *, seconds: float = 0.3) -> float:
    """Median seconds of a call on the device, after warm-up, with a cold second-level cache each time."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - started < seconds and len(samples) < 200):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def copy_bytes_per_second() -> float:
    """Bytes read and written a second by a large device copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def matmul_flops_per_second(dtype: torch.dtype, size: int = 8192) -> float:
    """Rate of a large square matmul."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b)


def measure(case: GpuCase, bandwidth: float, matmul: dict[str, float]) -> dict[str, Any]:
    """Run one case; shares and ratios that have a bound come with the verdict."""
    seconds = seconds_of(case.run)
    found: dict[str, Any] = {"ms": 1e3 * seconds}
    bounds: list[bool] = []
    if case.num_bytes is not None:
        found["copy_bandwidth_share"] = case.num_bytes / seconds / bandwidth
        if case.least_bandwidth_share is not None:
            bounds.append(found["copy_bandwidth_share"] >= case.least_bandwidth_share)
    if case.num_flops is not None:
        found["matmul_share"] = case.num_flops / seconds / matmul[case.flops_dtype]
        if case.least_matmul_share is not None:
            bounds.append(found["matmul_share"] >= case.least_matmul_share)
    if case.peer is not None:
        found["peer"], found["time_over_peer"] = case.peer_name, seconds / seconds_of(case.peer)
        if case.most_time_over_peer is not None:
            bounds.append(found["time_over_peer"] <= case.most_time_over_peer)
    return found | {"met": all(bounds)} if bounds else found


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the printed table."""
    if "error" in found:
        return f"{name:<58} {found['error']}"
    cells = [f"{found['ms']:9.3f} ms"]
    cells += [
        f"{key.replace('_', ' ')} {found[key]:.2f}" for key in ("copy_bandwidth_share", "matmul_share") if key in found
    ]
    if "peer" in found:
        cells.append(f"{found['time_over_peer']:.2f} of {found['peer']}")
    if "met" in found:
        cells.append("met" if found["met"] else "MISSED")
    return f"{name:<58} {'  '.join(cells)}"


def run_group(group: str, ceilings: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Measure a group's cases; one that fails is reported and the rest go on."""
    results: dict[str, Any] = {}
    for case in importlib.import_module(f"kernels_{group}").cases(torch.device("cuda")):
        if time.monotonic() > deadline:
            results[case.name] = {"error": f"not run: past {LIMIT_SECONDS:.0f} s"}
        else:
            try:
                results[case.name] = measure(
                    case, ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
                )
            except Exception as error:  # a table with one hole is worth more than none
                results[case.name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(line(case.name, results[case.name]), flush=True)
        torch.cuda.empty_cache()
    return results


def main() -> None:
    """Measure the ceilings, then every group asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=GROUPS, metavar="group", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    arguments = parser.parse_args()
    deadline = time.monotonic() + LIMIT_SECONDS
    ceilings: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
        "date": datetime.date.today().isoformat(),
        "copy_bytes_per_second": copy_bytes_per_second(),
        "matmul_flops_per_second": {
            str(dtype).removeprefix("torch."): matmul_flops_per_second(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        },
    }
    print(json.dumps(ceilings, indent=2), flush=True)
    results = {group: run_group(group, ceilings, deadline) for group in arguments.groups}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / RESULT).write_text(json.dumps({"ceilings": ceilings, "figures": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
