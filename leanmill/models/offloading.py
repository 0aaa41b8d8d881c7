"""Models larger than memory, frozen: some weights are held, the others read from their folder each time they are used.

The reading is accelerate's, asked for through transformers. A layer that is not held costs a read of its weights in
every forward, so this is for scoring and for a few tokens, not for serving; nothing is trained like this.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from leanmill.core.errors import ConfigError


@dataclass(frozen=True)
class Held:
    """How much of a model's weights is held where it runs.

    Args:
        gib: The most of its weights there, GiB. Beside a GPU what is left goes to main memory while it is free.
        device: Where the model runs.
    """

    gib: float
    device: torch.device

    def options(self) -> dict[str, Any]:
        """Return what transformers' `from_pretrained` is to be asked for.

        Raises:
            ConfigError: accelerate is not installed.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise ConfigError("holding a part of the weights needs accelerate; type pip install accelerate")
        most: dict[int | str, int] = {"cpu": int(self.gib * 2**30)}
        if self.device.type != "cpu":
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            most = {self.device.index or 0: most["cpu"], "cpu": int(0.9 * free)}
        return {"device_map": "auto", "max_memory": most}


def is_offloaded(model: Any) -> bool:
    """Whether accelerate moves the model's weights, which have their places then and go nowhere else."""
    return getattr(model, "hf_device_map", None) is not None
