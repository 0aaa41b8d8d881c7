"""How workers that talk rarely train one model. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError


class Overlap(NamedTuple):
    """What goes on while weights travel."""

    steps: int
    """Optimizer steps between sending and taking in."""
    keep_local: float
    """Share of its own weights that a worker keeps then."""


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

    @property
    def overlap(self) -> Overlap:
        """Nothing: workers wait for the mean and go on from it."""
        return Overlap(0, 0.0)

    def lines(self) -> list[str]:
        """Return what this is, in words."""
        return [
            f"{self.workers} workers, groups of neighbouring ranks, step without each other; after every "
            f"{self.every_steps:,} steps and at the end their weights meet in one outer step",
            _outer_sgd(self),
        ]


class StreamingDiLoCo(LowCommConfig):
    """DiLoCo a fragment of the model at a time, sent while training goes on (Streaming DiLoCo, arXiv:2501.18512)."""

    type: Literal["streaming_diloco"] = "streaming_diloco"
    every_steps: int = Field(default=100, ge=1)
    """Inner optimizer steps between two exchanges of the same fragment; fragments take turns in between."""
    layers_per_fragment: int = Field(default=3, ge=1)
    """Decoder blocks that travel together, from all depths; what lies in no block is a fragment of its own."""
    overlap_steps: int = Field(default=5, ge=0)
    """Inner steps that go on while a fragment travels (tau)."""
    keep_local: float = Field(default=0.5, ge=0, lt=1)
    """Share of its own weights that a worker keeps when the mean of a fragment comes in (alpha); with 0 all go on from
    the same."""
    lr: float = Field(default=0.4, gt=0)
    """Learning rate of the outer SGD."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum of the outer SGD."""
    gradient_dtype: Literal["fp32", "bf16", "e3m0"] = "e3m0"
    """As for `diloco`."""

    @model_validator(mode="after")
    def _arrives_before_it_is_sent_again(self) -> StreamingDiLoCo:
        if self.overlap_steps >= self.every_steps:
            raise ConfigError(
                f"layout.low_comm.overlap_steps={self.overlap_steps} must be below every_steps={self.every_steps}, "
                f"when the same fragment is sent again; set a smaller one"
            )
        return self

    @property
    def overlap(self) -> Overlap:
        """As it says."""
        return Overlap(self.overlap_steps, self.keep_local)

    def lines(self) -> list[str]:
        """Return what this is, in words."""
        return [
            f"{self.workers} workers, groups of neighbouring ranks, step without each other; in every "
            f"{self.every_steps:,} steps each fragment of {self.layers_per_fragment} blocks is sent once, and its mean "
            f"taken in {self.overlap_steps} steps later, {1 - self.keep_local:.0%} of it",
            _outer_sgd(self),
        ]


class CO2(LowCommConfig):
    """Outer steps a whole interval late, so that nobody waits for what travels (CO2, arXiv:2401.16265)."""

    type: Literal["co2"] = "co2"
    every_steps: int = Field(default=48, ge=1)
    """Inner optimizer steps between two outer ones, and how long what workers send may travel (tau)."""
    lr: float = Field(default=1.0, gt=0)
    """Learning rate of the outer step (eta)."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Outer momentum (beta)."""
    momentum_clip: float | None = Field(default=1.0, gt=0)
    """Every element of the outer momentum is cut to this magnitude (phi); null cuts none."""
    gap_penalty: bool = True
    """Divide an outer gradient by 1 + how far the weights went while it travelled, in mean outer steps; false takes it
    as it comes."""

    @property
    def overlap(self) -> Overlap:
        """The whole interval, after which all go on from the same."""
        return Overlap(self.every_steps, 0.0)

    def lines(self) -> list[str]:
        """Return what this is, in words."""
        clip = "not cut" if self.momentum_clip is None else f"cut to {self.momentum_clip:g} an element"
        penalty = ", outer gradients divided by their staleness gap" if self.gap_penalty else ""
        return [
            f"{self.workers} workers, groups of neighbouring ranks, step without each other; after every "
            f"{self.every_steps:,} steps they send how far they went and go on from what came of the interval before",
            f"outer step of learning rate {self.lr:g} on a momentum of {self.momentum:g}, {clip}{penalty}; what "
            f"workers send travels as {self.gradient_dtype}",
        ]


def _outer_sgd(config: DiLoCo | StreamingDiLoCo) -> str:
    return (
        f"outer SGD of learning rate {config.lr:g} with Nesterov momentum {config.momentum:g}; what workers send "
        f"travels as {config.gradient_dtype}"
    )


OuterConfig = Annotated[DiLoCo | StreamingDiLoCo | CO2, Field(discriminator="type")]
