"""Facts of a run that every log wants, as JSON-able values."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import leanmill
from leanmill.core.redact import redact_tree
from leanmill.report.observer import RunInfo


_PACKAGES = ("torch", "transformers", "datasets", "peft", "deepspeed", "torchao", "triton", "numpy")


def run_facts(info: RunInfo) -> dict[str, Any]:
    """Return what is known before the first step: sizes, seed, versions, hardware, notes; no credentials."""
    recipe = info.recipe
    facts = {
        "name": recipe.name,
        "seed": recipe.seed,
        "engine": info.engine.name,
        "precision": recipe.train.precision,
        "model": model_label(recipe.model.path, recipe.model.family_config),
        "techniques": [technique.type for technique in recipe.techniques],  # type: ignore[attr-defined]
        "world_size": info.world_size,
        "start_step": info.start_step,
        "num_steps": info.num_steps,
        "epochs": info.epochs,
        "tokens_per_step": recipe.batch.tokens_per_step,
        "num_parameters": info.num_parameters,
        "num_trainable": info.num_trainable,
        "flops_per_token": info.flops_per_token,
        "peak_flops_per_second": device_peak(info),
        "notes": list(info.notes),
        "versions": versions(),
        "hardware": hardware(info),
    }
    return redact_tree(facts)


def model_label(path: str | None, config: dict[str, Any] | None) -> str:
    """Name a model in a few words: the checkpoint it starts from, or its family and size."""
    if path:
        return path
    config = config or {}
    sizes = {"layers": config.get("num_hidden_layers"), "hidden": config.get("hidden_size")}
    words = [f"{label} {value}" for label, value in sizes.items() if value is not None]
    return ", ".join([str(config.get("model_type", "model")), *words])


def device_peak(info: RunInfo) -> float | None:
    """Peak dense matmul FLOP/s of one rank's device in the run's precision; None where it is not known."""
    from leanmill.models.flops import peak_flops_per_second

    return peak_flops_per_second(info.engine.device, info.recipe.train.precision)


def utilisation(info: RunInfo, peak: float | None, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation of all ranks together; None without a known peak of one rank."""
    from leanmill.models.flops import mfu

    return mfu(tokens_per_second, info.flops_per_token, info.world_size * peak) if peak else None


def versions() -> dict[str, str]:
    """Versions of Python, this project and the packages a result depends on."""
    found = {"leanmill": leanmill.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(info: RunInfo) -> dict[str, Any]:
    """What the run computes on, as seen from this rank."""
    import torch

    device = info.engine.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    # The cores this process may use, which a container or taskset makes fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": f"{cores} CPU cores, {platform.machine()}", "system": platform.system()}
