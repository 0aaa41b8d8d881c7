"""Where a figure was measured: the processor, what torch makes of it, versions, load and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).resolve().parents[1] / "results"
_KINDS = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512_vl": "avx512", "avx2": "avx2"}
"""Instructions that decide which path is the fastest, best first, and the folder of a processor's results."""
_FLAGS = ("f16c", "fma3", *reversed(_KINDS), "avx512_vnni", "avx512_fp16", "amx_int8", "bf16", "sve", "sve_bf16")


def kind() -> str:
    """The kind of this processor: results of one kind stand in one column."""
    has = torch.cpu.get_capabilities().get
    return next((name for flag, name in _KINDS.items() if has(flag)), platform.machine())


def conditions() -> dict[str, Any]:
    """Versions, processor, threads, load, date and command of a measurement."""
    packages = ("torch", "transformers", "deepspeed", "peft", "torchao")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    has = torch.cpu.get_capabilities().get
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", _script(), *map(_without_folders, sys.argv[1:])]),
        "python": platform.python_version(),
        "versions": versions,
        "processor": _model(),
        "processor_flags": [flag for flag in _FLAGS if has(flag)],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
    }


def _without_folders(argument: str) -> str:
    """An argument as it may be read elsewhere: of a path from the root of this machine, its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _script() -> str:
    """The script that runs, as it is called from the repository."""
    path = Path(sys.argv[0]).resolve()
    return str(path.relative_to(RESULTS.parents[1])) if path.is_relative_to(RESULTS.parents[1]) else path.name


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_result(name: str, figures: Mapping[str, Any], measured_under: Mapping[str, Any]) -> None:
    """Print and store one benchmark's figures with their conditions, in the folder of this kind of processor."""
    path = RESULTS / kind() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"figures": dict(figures), "conditions": dict(measured_under)}, indent=2) + "\n")
    print(f"{name}: {json.dumps(dict(figures), indent=2)}\n-> {path}")
