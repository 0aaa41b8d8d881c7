"""GPTQ. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import LayerPassConfig, LayerSolver


if TYPE_CHECKING:
    from torch import Tensor


class Gptq(LayerPassConfig):
    """Round columns in turn, the later ones making up for each error (Frantar et al. 2022, arXiv:2210.17323).

    Codes are symmetric integers. A group's scale is taken from its weights as they are when it begins,
    with all corrections; the authors' code takes weights that are stale inside a block of 128.
    """

    type: Literal["gptq"] = "gptq"
    """Name of the pass."""
    weight_bits: int = Field(default=4, ge=2, le=8)
    """Bits b of a weight; codes are -(2^(b-1) - 1) to 2^(b-1) - 1."""
    group_size: int | None = Field(default=128, ge=2)
    """Neighbours in a row that share a scale; None is one scale a row."""
    scale: Literal["absmax", "mse"] = "absmax"
    """`absmax`: the largest magnitude is the outermost code. `mse`: of 40 shares of that, from 1 down to
    0.22, the one with the least squared error."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Hessian, as a share of its mean."""
    order: Literal["activations", "columns"] = "activations"
    """`activations` fixes the features of largest square sum first (the authors' act-order) where a row
    has one scale, and keeps columns in place where it has groups; `columns` goes from left to right."""

    tokens: Literal["equal", "attention"] = "equal"
    """What calibration tokens count for. `attention`: by the attention they get, from `least_token_weight` to 1 in each
    row (RSQ, Sung et al. 2025, arXiv:2503.01820); the block's attention is then `eager`, and it runs once more."""
    least_token_weight: float = Field(default=0.01, ge=0, lt=1)
    """Of the token of a row that gets least; inputs are multiplied by it."""

    @model_validator(mode="after")
    def _uses_all(self) -> Self:
        if self.tokens == "equal" and self.least_token_weight != 0.01:
            raise ConfigError("gptq: least_token_weight is for tokens: attention; remove it, or type tokens: attention")
        return self

    @property
    def reads_attention(self) -> bool:
        return self.tokens == "attention"

    def token_weights(self, maps: Tensor) -> Tensor:
        from leanmill.quant.gptq.tokens import by_attention

        return by_attention(maps, self.least_token_weight)

    @property
    def bits_per_weight(self) -> float:
        return float(self.weight_bits)

    def solver(self) -> LayerSolver:
        from leanmill.quant.gptq.solver import GptqSolver

        return GptqSolver(
            num_bits=self.weight_bits,
            group_size=self.group_size,
            scale=self.scale,
            damping=self.damping,
            by_activations=self.order == "activations",
        )
