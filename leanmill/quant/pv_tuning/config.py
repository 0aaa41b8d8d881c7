"""Configuration of PV-Tuning. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_divisors
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites

Beta = Annotated[float, Field(ge=0, lt=1)]


class PvTuning(TrainedTechniqueConfig, WeightTechniqueConfig):
    """Train codes and levels of quantised weights by turns (PV-Tuning: Malinovskii et al. 2024, arXiv:2405.14852).

    A P step trains levels by their gradient, codes at rest. A V step moves a few codes: those whose weights the
    optimizer has moved farthest, to their nearest levels, as long as all weights together change little. Codes begin
    with the least squared error, or with those that a pass such as `gptq`, `cbq` or `squeezellm` left.
    """

    type: Literal["pv_tuning"] = "pv_tuning"
    """Name of the technique."""
    weight_bits: int = Field(default=2, ge=1, le=8)
    """Bits b of a code."""
    levels: Literal["symmetric", "signed", "midrise", "codebook"] = "symmetric"
    """What codes stand for: a trained scale, one a row or group, times -(2^(b-1) - 1) to 2^(b-1) - 1 (`symmetric`), one
    more below (`signed`) or the halves between, without zero (`midrise`); or 2^b trained numbers a row (`codebook`)."""
    group_size: int | None = Field(default=None, ge=2)
    """Neighbours in a row that share a scale; None is one a row. A `codebook` is that of a row."""
    every_steps: int = Field(default=1, ge=1)
    """Steps from one V step to the next; the first step of a run is none, since the optimizer knows no sizes yet."""
    max_change: float = Field(default=0.01, gt=0, le=1)
    """Share of a weight's codes that a V step looks at, those of largest difference."""
    trust_ratio: float = Field(default=0.01, gt=0)
    """Of ||W' - W|| to ||W||, W and W' being a weight before and after a V step: no further code moves beyond it."""
    accumulate: bool = True
    """Keep what the optimizer wrote, so that differences to the codes' weights grow over steps, as the authors train
    (their delta_decay 0). False: each step begins at the codes' weights, and the codes that a V step looks at move at
    least to the next level that way, the linearised step of the paper (delta_decay 1, force_code_update); their
    share and the trust ratio then fall to 0 over the run, as nothing else would bring codes to rest."""
    code_lr_factor: float = Field(default=10.0, gt=0)
    """Learning rate of what moves codes, as a multiple of `optimizer.lr`; the authors' is 10."""
    code_betas: tuple[Beta, Beta] = (0.0, 0.95)
    """Decay of the optimizer's moments for it."""

    @model_validator(mode="after")
    def _levels_fit(self) -> PvTuning:
        if self.weight_bits == 1 and self.levels in ("symmetric", "signed"):
            raise ConfigError(
                f"pv_tuning with weight_bits 1 and levels {self.levels} has no positive level; set levels: midrise or "
                f"codebook"
            )
        if self.levels == "codebook" and self.group_size is not None:
            raise ConfigError(
                f"pv_tuning.group_size={self.group_size} with levels codebook, which are those of a row; remove "
                f"group_size"
            )
        return self

    def writes_masters(self) -> bool:
        return True

    def reads_second_moments(self) -> str | None:
        """With lion every weight moves as far, and there is nothing to choose codes by."""
        return "quantise by another technique, such as lsq"

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put codes and levels on every target.

        Raises:
            ConfigError: `group_size` does not divide the inputs of a target.
        """
        from leanmill.core.parameters import ParamRule, ParamSettings
        from leanmill.quant.pv_tuning.rule import MoveCodes
        from leanmill.quant.pv_tuning.stage import PvStage

        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            num_in = int(site.raw_weight.shape[-1])
            if num_in % (self.group_size or num_in):
                raise ConfigError(
                    f"pv_tuning.group_size={self.group_size} does not divide the {num_in} inputs of {site.site_name}; "
                    f"set group_size: {near_divisors(self.group_size or num_in, num_in)}, or add {site.site_name!r} to "
                    f"pv_tuning.exclude"
                )
        sites.put(selected, lambda site: PvStage(site.raw_weight, self.weight_bits, self.levels, self.group_size))
        rule = MoveCodes(
            sites.model, every_steps=self.every_steps, max_change=self.max_change, trust_ratio=self.trust_ratio,
            accumulate=self.accumulate,
        )  # fmt: skip
        names = frozenset(site.weight_name for site in selected)
        settings = ParamSettings(lr_factor=self.code_lr_factor, weight_decay=0.0, betas=self.code_betas)
        weights = ParamRule(technique=self.type, match=names.__contains__, settings=settings)
        return Installation(step_rules=(rule,), param_rules=(weights,))
