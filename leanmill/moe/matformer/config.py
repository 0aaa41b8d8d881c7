"""Configuration of nested MLPs and of what is cut out of them. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites

Divisors = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class MatFormer(TechniqueConfig):
    """Train the first neurons of every MLP to do without the others (Devvrit et al. 2023, arXiv:2310.07707)."""

    type: Literal["matformer"] = "matformer"
    """Name of the technique."""
    granularities: Divisors = Field(default_factory=lambda: [1, 2, 4, 8])
    """Divisors d of the MLP's width: a sub-model has the first 1/d of the neurons, the same d in all layers."""
    mode: Literal["sample", "sum"] = "sample"
    """`sample`: every step trains one sub-model, drawn anew, as in the paper. `sum`: every step trains all of them on
    the same rows, as in the authors' code; a micro-batch has as many times the rows and memory, and the loss is the
    mean over sub-models."""
    probabilities: list[Annotated[float, Field(gt=0)]] | None = None
    """How likely each of `granularities` is drawn, up to a factor; None draws all alike. For `sample`."""

    @model_validator(mode="after")
    def _one_probability_each(self) -> MatFormer:
        if len(set(self.granularities)) != len(self.granularities):
            raise ConfigError(f"matformer: granularities={self.granularities} names one twice; name each once")
        if self.probabilities is None:
            return self
        if self.mode == "sum":
            raise ConfigError("matformer: mode sum draws nothing; remove probabilities, or type mode: sample")
        if len(self.probabilities) != len(self.granularities):
            raise ConfigError(
                f"matformer: {len(self.probabilities)} probabilities for {len(self.granularities)} granularities; give "
                f"one for each"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the down projection of every MLP.

        Raises:
            ConfigError: An MLP is none of plain linear layers, or a granularity does not divide its width.
        """
        from leanmill.moe.matformer.install import install_all, install_one

        if self.mode == "sum":
            return Installation(step_rules=install_all(sites, self.granularities))
        return Installation(step_rules=install_one(sites, context, self.granularities, self.probabilities))


class MixNMatch(SurgeryConfig):
    """Cut a smaller model out of one that `matformer` trained: the first neurons of every MLP."""

    type: Literal["mix_n_match"] = "mix_n_match"
    """Name of the pass."""
    granularity: int | None = Field(default=None, ge=1)
    """Divisor of the width, the same in all layers; give this, `widths` or `budget`."""
    widths: list[Annotated[int, Field(ge=1)]] | None = None
    """Neurons of each layer's MLP."""
    budget: float | None = Field(default=None, gt=0, le=1)
    """Share of all neurons to keep at most. Two neighbouring `granularities` are mixed, the narrower one in the first
    layers."""
    granularities: Divisors = Field(default_factory=lambda: [1, 2, 4, 8])
    """Divisors to mix, for `budget`."""
    padded: bool = False
    """Write layers of different widths as layers of the widest, zeros behind: the same function, for families whose
    configuration has one width, and no smaller than the widest everywhere."""

    @model_validator(mode="after")
    def _one_request(self) -> MixNMatch:
        given = [key for key in ("granularity", "widths", "budget") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"mix_n_match: give exactly one of granularity, widths and budget, not "
                f"{' and '.join(given) or 'none'}; type e.g. granularity: 2"
            )
        return self

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.moe.matformer.extraction import Cut

        return Cut(
            granularity=self.granularity,
            widths=self.widths,
            budget=self.budget,
            granularities=self.granularities,
            padded=self.padded,
        )
