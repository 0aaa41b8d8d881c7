"""From an engine section to the dictionary DeepSpeed wants, and what to refuse before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import DeepSpeedEngine, DeepSpeedOffload


BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced at once; DeepSpeed allocates this many fp32 elements up front, so no more than
the model has."""
PERSIST_BELOW = 100_000
"""ZeRO-3 keeps parameters with fewer elements gathered, where a collective costs more than memory."""


def check_config(config: DeepSpeedEngine) -> None:
    """Refuse what cannot run on this machine, before anything is built.

    Raises:
        ConfigError: NVMe offload outside stage 3, or its directory or libaio missing.
    """
    for field, offload in _offloads(config).items():
        if offload.device == "nvme":
            _check_nvme(field, offload, config.stage)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers whose state is not element-wise: ZeRO cuts state at any element.

    Raises:
        ConfigError: The optimizer keeps quantised blocks.
    """
    inner = getattr(optimizer, "inner", optimizer)
    # torchao's optimizers keep their state in tensor subclasses of quantised blocks; there is no
    # capability to ask for before a step, so ask where the class comes from.
    if type(inner).__module__.partition(".")[0] == "torchao":
        raise ConfigError(
            "low-bit optimizers keep blocks that ZeRO would cut; use engine.type: fsdp with this optimizer, "
            "or optimizer.type: adamw with engine.type: deepspeed"
        )


def derive_config(
    config: DeepSpeedEngine,
    module: nn.Module,
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    num_micro_batches: int,
    max_grad_norm: float | None,
    persist_below: int = PERSIST_BELOW,
) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    bf16 is `torch_autocast`, not DeepSpeed's own bf16 mode: parameters stay fp32, so that nothing
    casts frozen bool masks or learned scales, a mask is chosen on the weights the optimizer writes
    rather than on their rounding, gradients are summed and accumulated in fp32 in every stage
    (DeepSpeed's own mode refuses that for stage 0), and a checkpoint holds the numbers that trained.
    ZeRO-3 gathers fp32 for it: twice the traffic and twice the gathered memory of the other mode.

    Args:
        config: The engine section.
        module: The module to be trained, on any device.
        device: Where it trains.
        precision: Of the matmuls.
        num_micro_batches: Backward passes of a step.
        max_grad_norm: Clipping threshold; None turns DeepSpeed's clipping off.
        persist_below: See `PERSIST_BELOW`.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,  # only used for its own progress lines
        "gradient_accumulation_steps": num_micro_batches,
        # Stage 0 has no clipping of its own that also tells the norm, so the engine clips there.
        "gradient_clipping": (max_grad_norm or 0.0) if config.stage > 0 else 0.0,
        "steps_per_print": 2**31,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # An empty list of safe modules: gradients of linear layers too are reduced in fp32.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        # The recipe's own optimizer steps flat partitions wherever they live; ours are element-wise.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(config, module, device, persist_below),
    }


def _zero_section(
    config: DeepSpeedEngine, module: nn.Module, device: torch.device, persist_below: int
) -> dict[str, Any]:
    sizes = [_num_elements(p) for p in module.parameters()]
    # DeepSpeed aligns what it gathers to pairs of elements and refuses an odd bucket.
    bucket_size = 2 * -(-max(1, min(BUCKET_ELEMENTS, sum(sizes))) // 2)
    zero: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": bucket_size,
        "allgather_bucket_size": bucket_size,
        # Patches torch.nn.functional.linear for the whole process otherwise.
        "memory_efficient_linear": False,
        # Modules to gather whole are named by the engine, by capability instead of class.
        "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
    }
    if config.stage == 3:
        zero["stage3_param_persistence_threshold"] = persist_below
    if device.type == "cpu":
        zero["overlap_comm"] = False  # there are no streams to overlap on
    pin = device.type == "cuda"
    if config.offload_optimizer is not None:
        zero["offload_optimizer"] = _offload(config.offload_optimizer, pin)
        if config.offload_optimizer.device == "nvme":
            # One parameter a sub-group. DeepSpeed reads swapped gradients by direct I/O straight into the
            # sub-group's buffer; a parameter that starts off a block boundary gets wrong values, silently.
            zero["sub_group_size"] = 1
    if config.offload_parameters is not None:
        zero["offload_param"] = _offload(config.offload_parameters, pin) | (
            # DeepSpeed's default of 1e8 elements pins 2 GB whatever the model's size.
            {"buffer_size": max(sizes), "buffer_count": 5} if config.offload_parameters.device == "nvme" else {}
        )
    return zero


def _offloads(config: DeepSpeedEngine) -> dict[str, DeepSpeedOffload]:
    both = {
        "engine.offload_optimizer": config.offload_optimizer,
        "engine.offload_parameters": config.offload_parameters,
    }
    return {field: offload for field, offload in both.items() if offload is not None}


def _check_nvme(field: str, offload: DeepSpeedOffload, stage: int) -> None:
    if stage != 3:
        raise ConfigError(f"{field}.device: nvme needs engine.stage 3, got {stage}; set engine.stage=3, or device: cpu")
    folder = Path(offload.path or "")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{field}.path: {offload.path} is not a directory that can be written; create it first")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"{field}.device: nvme needs libaio and a C++ compiler; type `apt-get install libaio-dev g++` "
            f"(Debian, Ubuntu) or `dnf install libaio-devel gcc-c++`, or set {field}.device: cpu"
        )


def _offload(offload: DeepSpeedOffload, pin_memory: bool) -> dict[str, Any]:
    if offload.device == "cpu":
        return {"device": "cpu", "pin_memory": pin_memory}
    return {"device": "nvme", "nvme_path": offload.path, "pin_memory": pin_memory}


def _num_elements(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
