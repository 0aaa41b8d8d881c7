"""Configuration of stochastic depth and LayerSkip. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class EarlyExitConfig(Config):
    """Losses of the model's own norm and head after blocks before the last (LayerSkip)."""

    scale: float = Field(default=0.2, gt=0, le=1)
    """How much early exits count, the paper's e_scale: block l of 0 to L - 2 counts scale x (0 + ... + l), the
    last one L - 1 + scale x (0 + ... + L - 2); what takes part in a step is divided by its sum. The paper
    takes 0.1 to 0.2 for pretraining and 1 for fine-tuning."""
    curriculum: Literal["rotational", "gradual", "all"] = "rotational"
    """Which blocks take part in a step: every `rotation`-th one, moving on by one a step; one more every
    T / (2 L) of T steps, from the last to the first; or all."""
    rotation: int = Field(default=8, ge=1)
    """Blocks between two exits of a step under `rotational`; more of them cost less. Not used by the others."""


class StochasticDepth(TechniqueConfig):
    """Drop decoder blocks at random in training.

    Stochastic depth: Huang et al. 2016, arXiv:1603.09382; LayerSkip: Elhoushi et al. 2024, arXiv:2404.16710.
    """

    type: Literal["stochastic_depth"] = "stochastic_depth"
    """Name of the technique."""
    rate: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a block is dropped, for the block and step where that is largest."""
    over_layers: Literal["exponential", "linear", "uniform"] = "exponential"
    """Share of `rate` of block l of 0 to L - 1: 2^(l / (L - 1)) - 1 as in LayerSkip, (l + 1) / L as in
    stochastic depth, or 1."""
    over_time: Literal["constant", "exponential"] = "constant"
    """Share of that in step t of 0 to T - 1: 1, for models that are trained already, or 2^(t / (T - 1)) - 1."""
    granularity: Literal["row", "batch"] = "row"
    """What shares a decision: each row of the batch alone, as in LayerSkip, where blocks run for all rows and
    count for those kept; or all rows of a step, as in stochastic depth, where a dropped block does not run."""
    rescale: bool = False
    """Divide what a kept block adds by its probability of being kept, so that it is right on average.
    LayerSkip does not. Stochastic depth multiplies at inference instead, which no plain model does."""
    early_exit: EarlyExitConfig | None = None
    """Losses at early exits; None has none."""

    @model_validator(mode="after")
    def _does_something(self) -> StochasticDepth:
        if self.rate == 0 and self.early_exit is None:
            raise ConfigError(
                "stochastic_depth with rate 0 and no early_exit does nothing; set rate: 0.1, or early_exit: {}"
            )
        return self

    def leaves_modules_out(self) -> str | None:
        """Return what to set so that no step leaves a block out."""
        return "stochastic_depth.granularity=row" if self.granularity == "batch" and self.rate > 0 else None

    def shares_cross_entropy(self) -> str | None:
        """Early exits do."""
        return None if self.early_exit is None else "stochastic_depth.early_exit"

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around every decoder block.

        Raises:
            ConfigError: Blocks of this family return more than hidden states, or, with `early_exit`, more
                than a norm and a plain head follow them.
        """
        from leanmill.architecture.stochastic_depth.install import install_drops, install_exits

        rules = []
        if self.rate > 0:
            rules += install_drops(
                sites,
                context,
                rate=self.rate,
                over_layers=self.over_layers,
                over_time=self.over_time,
                granularity=self.granularity,
                rescale=self.rescale,
            )
        if self.early_exit is not None:
            chosen = self.early_exit
            rules += install_exits(
                sites, context, scale=chosen.scale, curriculum=chosen.curriculum, rotation=chosen.rotation
            )
        return Installation(step_rules=rules)
