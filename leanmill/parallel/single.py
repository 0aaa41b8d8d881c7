"""The engine of one process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import SingleEngine as SingleConfig
from leanmill.parallel.engine import Preparation
from leanmill.parallel.launch import Ranks
from leanmill.parallel.layout import Layout
from leanmill.parallel.staging import ReplicaStaging
from leanmill.parallel.torch_engine import TorchEngine


class SingleEngine(TorchEngine):
    """One process, nothing sharded. bf16 is autocast over fp32 weights.

    Args:
        config: The recipe's engine section.
        ranks: Which process this is.
        precision: Compute precision.
        layout: Of the run; None has one process.

    Raises:
        ConfigError: More than one process would step together.
    """

    name = "single"

    def __init__(
        self,
        config: SingleConfig,
        *,
        ranks: Ranks,
        precision: Literal["fp32", "bf16"],
        layout: Layout | None = None,
    ) -> None:
        super().__init__(ranks=ranks, precision=precision, layout=layout)
        if self.layout.step_size != 1:
            of_worker = "" if self.layout.workers == 1 else " for each worker"
            raise ConfigError(
                f"engine: single runs one process, but {self.layout.step_size} were started{of_worker}; "
                f"type engine=ddp or engine=fsdp, or start one process{of_worker}"
            )
        self.config = config

    def prepare(self, module: nn.Module, preparation: Preparation) -> None:
        self.staging = ReplicaStaging(self._staged_once(module, self.config.staging), self.precision)
        preparation.materialise(module)
        self.module = module.to(self.device)
        self._make_optimizer(preparation)

    def _micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return freeze(model, self.precision).to(self.device)


def freeze(model: nn.Module, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """Freeze `model` in eval mode, its weights in the run's compute precision.

    Buffers keep their dtype: rotary frequencies lose positions in bf16.
    """
    model.eval().requires_grad_(False)
    if precision == "bf16":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    return model
