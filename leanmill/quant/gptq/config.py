"""GPTQ. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import LayerPassConfig, LayerSolver, SeenTokens


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

    tokens: Literal["equal", "attention", "first", "first_and_last", "rare", "norm", "unchanged", "distant"] = "equal"
    """What calibration tokens count for (RSQ, Sung et al. 2025, arXiv:2503.01820). Only the `first` of each row, or the
    `first_and_last`, `token_share` of them. Or from `least_token_weight` to 1 in each row: by the `attention` they get,
    for which the block's attention is `eager` and runs once more; `rare` by how seldom they are in calibration rows;
    by the `norm` of the block's input; `unchanged` by how little the block changes it; `distant` by its mean squared
    distance to the others of the row. But for `rare` these run the block once more too."""
    least_token_weight: float = Field(default=0.01, ge=0, lt=1)
    """Of the token of a row that gets least; inputs are multiplied by it."""
    token_share: float = Field(default=0.125, gt=0, lt=1)
    """For `first` and `first_and_last`: of a row's tokens, those that count; one at least."""

    @model_validator(mode="after")
    def _uses_all(self) -> Self:
        kinds = {"equal": None, "first": "token_share", "first_and_last": "token_share"}
        used = kinds.get(self.tokens, "least_token_weight")
        examples = {"least_token_weight": "tokens: attention", "token_share": "tokens: first"}
        for name, example in examples.items():
            if name != used and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"gptq: {name} says nothing with tokens: {self.tokens}; remove it, or type {example}")
        return self

    @property
    def counts_tokens_by(self) -> Literal["ids", "states", "attention"] | None:
        if self.tokens == "equal":
            return None
        if self.tokens == "attention":
            return "attention"
        return "ids" if self.tokens in ("first", "first_and_last", "rare") else "states"

    def token_weights(self, seen: SeenTokens) -> Tensor:
        from leanmill.quant.gptq.tokens import SCORES, ends, spread

        if self.tokens in SCORES:
            return spread(SCORES[self.tokens](seen), self.least_token_weight)
        return ends(seen, self.token_share, last_too=self.tokens == "first_and_last")

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
