"""EvoPress. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.levels import LevelSearch, SearchConfig


class Selection(Config):
    """One stage of selection."""

    survivors: int = Field(ge=1)
    """Candidates that stay."""
    tokens: int = Field(ge=1)
    """Tokens of calibration text they are judged on, the same for all."""


def _as_published() -> list[Selection]:
    return [
        Selection(survivors=8, tokens=2048),
        Selection(survivors=2, tokens=16384),
        Selection(survivors=1, tokens=65536),
    ]


class EvoPress(SearchConfig):
    """A level for each unit by evolution (Sieberling et al. 2024, arXiv:2410.14649).

    One parent; offspring differ from it by one to three switches, each taking one unit a level up and another one
    down, so that the budget is kept; selection in stages on growing text, the parent joining the last one, by the
    divergence of the dense model's predictions from the compressed one's. Both ends of a switch are different units,
    which in the authors' code may be one; where no new offspring is left, a generation has fewer.
    """

    says_how_long: ClassVar[frozenset[str]] = frozenset({"generations"})
    type: Literal["evopress"] = "evopress"
    """Name of the pass."""
    generations: int = Field(default=100, ge=1)
    """Generations; the paper takes 400 for sparsity, 150 for bits, and for dropping k of n some k (n - k) / 1.5."""
    offspring: int = Field(default=64, ge=1)
    """Of a generation; the paper takes 64 for sparsity, 128 for bits, 32 for dropping."""
    selection: list[Selection] = Field(default_factory=_as_published, min_length=1)
    """Stages, each with fewer survivors and more text than the one before; one survives the last."""
    exchange: Literal["same_size", "any"] = "same_size"
    """Between which units a switch goes. `same_size`: of equal numbers of weights, so that all switches cost nothing.
    `any`: some units go up, and then others down until the budget is met again."""
    num_starts: int = Field(default=16, ge=1)
    """Random candidates of which the best is the first parent, where no level alone meets the budget exactly."""
    start_tokens: int = Field(default=2048, ge=1)
    """Tokens that those are judged on."""

    @model_validator(mode="after")
    def _narrows(self) -> Self:
        for first, then in zip(self.selection, self.selection[1:], strict=False):
            if then.survivors > first.survivors or then.tokens < first.tokens:
                raise ConfigError(
                    f"selection: {then.survivors} of {first.survivors} survivors on {then.tokens} after {first.tokens} "
                    f"tokens; give each stage fewer survivors and more tokens than the one before"
                )
        if self.selection[-1].survivors != 1:
            raise ConfigError(
                f"selection: {self.selection[-1].survivors} survive the last stage; one becomes the next parent, set 1"
            )
        return self

    @property
    def most_tokens(self) -> int:
        return max(self.selection[-1].tokens, self.start_tokens)

    def search(self, seed: int) -> LevelSearch:
        from leanmill.search.evopress.evolution import Evolution

        return Evolution(
            generations=self.generations,
            offspring=self.offspring,
            stages=[(stage.survivors, stage.tokens) for stage in self.selection],
            exchanges_any=self.exchange == "any",
            num_starts=self.num_starts,
            start_tokens=self.start_tokens,
            seed=seed,
        )
