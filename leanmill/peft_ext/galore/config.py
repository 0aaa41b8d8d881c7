"""Configuration of training in gradient subspaces. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.parameters import ParamRule, ParamSettings
from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.site import Site
    from leanmill.core.sites import Sites


class NaturalGradient(Config):
    """Natural GaLore (Das 2024, arXiv:2410.16029): gradients are divided by the Fisher matrix of the last ones."""

    history: int = Field(default=20, ge=1)
    """Gradients in the subspace that the Fisher matrix is made of (s in the paper); each is kept."""
    damping: float = Field(default=1e-3, gt=0)
    """Added to the Fisher matrix (lambda)."""


class GaLore(WeightTechniqueConfig):
    """Train weights through the leading subspace of their gradients (GaLore: Zhao et al. 2024, arXiv:2403.03507).

    What is not among `targets` (embedding, norms, head) trains as it does without.
    """

    type: Literal["galore"] = "galore"
    """Name of the technique."""
    rank: int = Field(default=128, ge=1, le=65_536)
    """Dimensions of a subspace (r), at most the shorter side of each weight."""
    every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between subspaces (T in the paper)."""
    scale: float = Field(default=0.25, gt=0)
    """What the optimizer's step in the subspace is multiplied with (alpha); 0.25 in the paper's pre-training, 2 to 8
    in its fine-tuning."""
    subspace: Literal["svd", "sketch", "random"] = "svd"
    """Where a subspace comes from. `svd`: the leading singular vectors of that step's gradient, as in the paper; every
    rank holds all gradients whole in that step. `sketch`: those of its product with a random matrix, which takes
    little memory, used from the next step on. `random`: drawn."""
    natural: NaturalGradient | None = None
    """Step along the natural gradient in the subspace (Natural GaLore)."""

    @model_validator(mode="before")
    @classmethod
    def _rate_and_decay(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "lr_factor" in raw:
            raise ConfigError(
                "galore.lr_factor: the rate in the subspace is galore.scale x optimizer.lr; set galore.scale"
            )
        if isinstance(raw, dict) and "weight_decay" in raw:
            raise ConfigError(
                "galore.weight_decay: weights that train in a subspace are not decayed, which would be a step out of "
                "it; remove it"
            )
        return raw

    def own_settings(self) -> ParamSettings:
        """The step in the subspace is `scale` times that elsewhere."""
        return ParamSettings(lr_factor=self.scale)

    def changes_base(self) -> bool:
        """With every new subspace, weights take up what was trained in the one before."""
        return True

    def writes_masters(self) -> bool:
        """A new subspace starts from coordinates 0."""
        return True

    def needs_whole_experts(self) -> bool:
        """A subspace is found from gradients of all of a weight."""
        return True

    def _check_rank(self, site: Site) -> None:
        *_, num_out, num_in = site.raw_weight.shape
        if self.rank > min(num_out, num_in):
            raise ConfigError(
                f"galore.rank {self.rank} is above the shorter side of {site.site_name}, {num_out} x {num_in}; set "
                f"rank: {min(num_out, num_in)} or less, or add {site.site_name!r} to galore.exclude"
            )

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a stage with subspace and coordinates on every target, and freeze what is under it.

        Raises:
            ConfigError: `rank` is above a side of a weight, or there is no seed to draw with.
        """
        from leanmill.peft_ext.galore.rule import RefreshSubspaces
        from leanmill.peft_ext.galore.stage import GaLoreStage

        if context.seed is None:
            raise ConfigError("galore draws its first subspaces and was given no seed; set `seed: 0` in the recipe")
        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            self._check_rank(site)
        history = 0 if self.natural is None else self.natural.history
        sites.put(selected, lambda site: GaLoreStage(site.raw_weight, self.rank, source=self.subspace, history=history))
        names = {site.weight_name for site in selected}
        return Installation(
            step_rules=(
                RefreshSubspaces(
                    sites.model,
                    source=self.subspace,
                    every_steps=self.every_steps,
                    damping=0.0 if self.natural is None else self.natural.damping,
                    seed=context.seed,
                ),
            ),
            param_rules=(ParamRule(technique="galore", match=names.__contains__, trainable=False),),
        )
