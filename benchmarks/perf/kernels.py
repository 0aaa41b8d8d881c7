"""Kernels against their peers on the CPU: ratios of time and of memory, side by side in one run.

Each group of kernels lists its cases in `kernels_<group>.py`. A time case alternates calls of ours
and of the peer, then of ours and the naive definition under torch.compile; figures are medians of pairwise ratios.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kernel_case import Case, MemoryCase
from machine import conditions, write_result


GROUPS = ("nm_mask", "fake_quant", "packing", "experts", "losses")
WARMUP_SECONDS = 3.0
COMPILED_SECONDS = 5.0


def seconds_of(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_time(case: Case) -> dict[str, Any]:
    """Run a time case."""
    started = time.perf_counter()
    # The first large outputs of a process wait for the system to gather huge pages, on some virtual machines long.
    while time.perf_counter() - started < WARMUP_SECONDS:
        case.ours()
        case.peer()
    gc.collect()
    pairs = [(seconds_of(case.ours), seconds_of(case.peer)) for _ in range(case.rounds)]
    found = {
        "ratio": statistics.median(ours / peer for ours, peer in pairs),
        "ours_ms": 1e3 * statistics.median(ours for ours, _ in pairs),
        "peer_ms": 1e3 * statistics.median(peer for _, peer in pairs),
    }
    return found if case.definition is None else found | against_compiled(case.ours, case.definition, case.rounds)


def against_compiled(ours: Callable[[], object], definition: Callable[[], object], most_rounds: int) -> dict[str, Any]:
    """Alternate ours and the compiled definition, some of which take seconds a call, for a limited time."""
    # Recompiles count by code, and several cases compile the same function.
    torch.compiler.reset()
    definition()
    definition()
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    while not pairs or (len(pairs) < most_rounds and time.perf_counter() - started < COMPILED_SECONDS):
        pairs.append((seconds_of(ours), seconds_of(definition)))
    return {
        "ratio_to_compiled": statistics.median(ours / compiled for ours, compiled in pairs),
        "compiled_ms": 1e3 * statistics.median(compiled for _, compiled in pairs),
        "compiled_rounds": len(pairs),
    }


def measure_memory(case: MemoryCase) -> dict[str, Any]:
    """Run a memory case."""
    ours, peer = case.ours_bytes(), case.peer_bytes()
    return {"ratio": ours / peer, "ours_mib": ours / 2**20, "peer_mib": peer / 2**20}


def measure(case: Case | MemoryCase) -> dict[str, Any]:
    """Run any case and add what the number means."""
    figures = measure_time(case) if isinstance(case, Case) else measure_memory(case)
    return figures | {"limit": case.limit, "peer": case.peer_name, "conditions": case.conditions}


def main() -> None:
    """Measure the groups asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=GROUPS, metavar="group", help=f"of {', '.join(GROUPS)}")
    groups = parser.parse_args().groups
    measured_under = conditions()
    for group in groups:
        figures = {}
        for case in importlib.import_module(f"kernels_{group}").cases():
            figures[case.name] = measure(case)
            verdict = "met" if figures[case.name]["ratio"] <= case.limit else "MISSED"
            print(f"{case.name}: {figures[case.name]['ratio']:.3f} of {case.peer_name} (<= {case.limit}) {verdict}")
        write_result(f"kernels_{group}", figures, measured_under)


if __name__ == "__main__":
    main()
