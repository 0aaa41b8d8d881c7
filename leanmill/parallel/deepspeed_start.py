"""DeepSpeed's import, which looks for devices and compilers, made to suit the device of the run."""

from __future__ import annotations

import contextlib
import logging
import os

import torch

from leanmill.core.quiet import ignore_warning


def start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed, quietly, for this device and on the process group that exists."""
    # It insists on the launcher's variable even when it is handed a process group.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    with contextlib.redirect_stdout(None):
        import deepspeed
        from deepspeed import accelerator, ops
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        # It calls collectives by names that torch has deprecated, once a parameter.
        ignore_warning(r".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)
        if device.type == "cpu" and accelerator.get_accelerator().device_name() != "cpu":
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            accelerator.set_accelerator(CPU_Accelerator())
        # Its shared-memory all-reduce for CPUs is compiled at start (20 to 100 s, and needs a
        # compiler); gloo does without.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=None, dist_init_required=False)
