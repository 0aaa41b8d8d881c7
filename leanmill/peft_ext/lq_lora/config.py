"""LQ-LoRA. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import DecomposingPassConfig, DecomposingSolver


class LqLora(DecomposingPassConfig):
    """Take each weight apart into codes of few bits and a delta of low rank (Guo et al. 2023, arXiv:2311.12023).

    Codes stay in the folder as the values they stand for; `model.frozen_dtype: stored` keeps them as codes. The delta
    lies beside them as an adapter, with which `lora` of `init: stored` begins.
    """

    type: Literal["lq_lora"] = "lq_lora"
    """Name of the pass."""
    rank: int = Field(default=64, ge=1)
    """Of the deltas, at most the shorter side of each weight."""
    bits: list[Literal[2, 3, 4, 8]] = Field(default=[4], min_length=1)
    """Bits of a weight: one number for all, or several from which each layer gets one. 2 to 4 bits are levels of
    NormalFloat times a scale for 64 neighbours, 8 integers times a scale a row."""
    average_bits: float | None = Field(default=None, gt=0)
    """Of several `bits`, those with which all layers together have the least error are chosen by an integer program
    that keeps to so many bits a weight on average, scales included."""
    weighted: bool = True
    """Count errors by the mean squared gradient of each weight over calibration rows, the diagonal of the Fisher
    information; its means over rows and columns weigh the delta. Takes memory for the model in fp32, twice."""
    iterations: int = Field(default=100, ge=1)
    """Turns of delta and codes at most; they end as soon as the error does not fall."""
    svd: Literal["randomised", "full"] = "randomised"
    """How deltas are found: `randomised` (Halko et al. 2011) with 10 more vectors than wanted, as in the authors' code,
    or by the whole decomposition."""

    @model_validator(mode="after")
    def _has_something_to_choose_by(self) -> Self:
        if len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"lq_lora.bits={self.bits} names a number twice; leave one out")
        if len(self.bits) > 1 and self.average_bits is None:
            raise ConfigError(
                f"lq_lora.bits={self.bits} leaves a choice, and nothing says how many bits there are; set "
                f"average_bits, e.g. {sum(self.bits) / len(self.bits):g}, or give one number"
            )
        if len(self.bits) == 1 and self.average_bits is not None:
            raise ConfigError(
                f"lq_lora.average_bits is for a choice of bits, and bits={self.bits} leaves none; remove it, or set "
                f"bits: [2, 3, 4, 8]"
            )
        return self

    @property
    def reads_text(self) -> bool:
        return self.weighted

    def check_shape_of(self, name: str, shape: tuple[int, int]) -> None:
        if self.rank > min(shape):
            raise ConfigError(
                f"lq_lora.rank={self.rank} is above the shorter side of {name}, {shape[0]} x {shape[1]}; set rank: "
                f"{min(shape)} or less, or add {name!r} to lq_lora.exclude"
            )

    def solver(self) -> DecomposingSolver:
        from leanmill.peft_ext.lq_lora.solver import LqSolver

        return LqSolver(
            rank=self.rank,
            bits=self.bits,
            average_bits=self.average_bits,
            iterations=self.iterations,
            is_randomised=self.svd == "randomised",
        )
