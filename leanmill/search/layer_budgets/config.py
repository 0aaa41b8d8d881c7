"""Layer-adaptive budgets. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.levels import LevelSearch, SearchConfig


class LayerBudgets(SearchConfig):
    """The levels whose errors add up to the least, by dynamic programming.

    With errors at the model's output (Xu et al. 2023, arXiv:2308.10438) each unit is compressed alone, and what the
    dense model's predictions diverge by is taken; with errors of layers (SPDY, Frantar and Alistarh 2022,
    arXiv:2201.13096, as the baseline of EvoPress) the squared error of each layer's output over its energy. Errors of
    several units add up only as far as they are small, which is what `evopress` does without.
    """

    type: Literal["layer_budgets"] = "layer_budgets"
    """Name of the pass."""
    error: Literal["output", "layer"] = "output"
    """What adds up."""
    tokens: int = Field(default=16384, ge=1)
    """Of calibration text that `output` is measured on."""

    @model_validator(mode="after")
    def _uses_all(self) -> Self:
        if self.error == "layer" and self.tokens != 16384:
            raise ConfigError(
                "layer_budgets: tokens is for error: output, errors of layers are of all calibration rows; remove it"
            )
        return self

    @property
    def most_tokens(self) -> int:
        return self.tokens if self.error == "output" else 1

    def search(self, seed: int) -> LevelSearch:
        from leanmill.search.layer_budgets.program import Program

        return Program(num_tokens=self.tokens if self.error == "output" else None, seed=seed)
