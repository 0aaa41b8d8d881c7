"""How workers that talk rarely train one model. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.config import Config


class LowCommConfig(Config):
    """What every way of training with little communication asks for."""

    workers: int = Field(ge=1)
    """Groups of neighbouring ranks that step without each other; each trains the whole model under `engine`, on rows
    of its own. All ranks are workers x the ranks of one."""
    every_steps: int = Field(ge=1)
    """Optimizer steps that a worker takes between two exchanges of the same weights."""
    gradient_dtype: Literal["fp32", "bf16", "e3m0"] = "fp32"
    """What an outer gradient travels as: as it is; rounded to bf16; or in 4 bits, a sign and a power of two
    under the largest of 256. Means are taken in fp32."""
    patience_seconds: int = Field(default=1800, ge=1)
    """How long a worker waits in an exchange for the slowest."""


class DiLoCo(LowCommConfig):
    """Inner steps on each worker, then one outer step on the mean of how far they went (DiLoCo, arXiv:2311.08105)."""

    type: Literal["diloco"] = "diloco"
    every_steps: int = Field(default=500, ge=1)
    """Inner optimizer steps between two outer ones."""
    lr: float = Field(default=0.7, gt=0)
    """Learning rate of the outer SGD."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum of the outer SGD."""

    def lines(self) -> list[str]:
        """Return what this is, in words."""
        return [
            f"{self.workers} workers, groups of neighbouring ranks, step without each other; after every "
            f"{self.every_steps:,} steps and at the end their weights meet in one outer step",
            f"outer SGD of learning rate {self.lr:g} with Nesterov momentum {self.momentum:g}; what workers send "
            f"travels as {self.gradient_dtype}",
        ]
