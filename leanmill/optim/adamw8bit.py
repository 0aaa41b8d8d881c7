"""torchao's 8-bit AdamW with a learning rate that a schedule may write as a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchao.optim import AdamW8bit as _AdamW8bit

from leanmill.core.quiet import ignore_warning


class AdamW8bit(_AdamW8bit):  # type: ignore[misc]
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861).

    torchao compiles its update and wants learning rates as tensors, which only an in-place write
    may change. Here groups hold numbers, as in every other optimizer; they are tensors while a
    step runs. Needs a working compiler (Triton on CUDA, C++ on the CPU).

    Args:
        params: Parameters or groups.
        **settings: `lr`, `betas`, `eps`, `weight_decay`, as torchao has them.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        # torch cannot hash torchao's state for its on-disk cache, and then hashes what is inside it.
        ignore_warning("OptimState8bit does not implement _stable_hash_for_caching", UserWarning)
        super().__init__(params, **settings)
        for group in self.param_groups:
            group["lr"] = float(group["lr"])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Write the parameters that have a gradient."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        try:
            return super().step(closure)  # type: ignore[no-any-return]
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
