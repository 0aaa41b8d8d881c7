"""Configuration of learned step sizes. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig
from leanmill.quant.config import LayerBits, SharedScales, Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Lsq(TrainedTechniqueConfig, LayerBits, Warmup, SharedScales):
    """Weights, and activations if asked, on integer grids whose step sizes are trained.

    LSQ: Esser et al. 2020, arXiv:1902.08153. Steps start at 2 mean |w| / sqrt(Qp) of the loaded weights,
    those of activations at that of the first global batch, and get no weight decay. With one bit the grid
    of weights is {-s/2, s/2}. LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576) is `activation_offset: true` and
    `weight_start: lsq_plus`.
    """

    type: Literal["lsq"] = "lsq"
    """Name of the technique."""
    weight_bits: int = Field(default=4, ge=1, le=8)
    """Bits b of a weight."""
    grid: Literal["signed", "symmetric", "midrise"] = "signed"
    """Codes: `signed` -2^(b-1) to 2^(b-1) - 1 as in the paper, `symmetric` without the lowest, `midrise`
    the halves between, without zero."""
    granularity: Literal["tensor", "row", "group"] = "tensor"
    """What shares a step: a whole weight as in the paper (each expert of a stacked one), an output row,
    or `group_size` neighbours of a row."""

    activation_bits: int | None = Field(default=None, ge=1, le=8)
    """Bits of the activations that enter a target, with one step for all of them; None leaves them alone. An
    embedding, which looks rows up, has none."""
    activation_grid: Literal["signed", "unsigned", "midrise"] = "signed"
    """Codes of activations: `signed` and `midrise` as for weights, `unsigned` 0 to 2^b - 1 for inputs that are never
    negative, such as those behind a ReLU. Behind SiLU or GELU they are signed."""

    activation_offset: bool = False
    """LSQ+: codes of activations stand around a trained offset, so that the grid covers what is not symmetric, such
    as the output of SiLU or GELU. Step and offset start at the least squared error over the first global batch."""
    weight_start: Literal["lsq", "lsq_plus", "l4q", "levels"] = "lsq"
    """Where steps of weights start: `lsq` 2 mean |w| / sqrt(Qp), `lsq_plus` max(|mu - 3 sigma|, |mu + 3 sigma|) /
    2^(b-1), `l4q` max(|min w| / Qn, |max w| / Qp) of what shares a step, so that nothing is clipped at first. `levels`
    max |w| / k with the k up to Qp (Qn) of least squared error: of weights that a pass such as `gptq` or `cbq` left on
    this grid the step that keeps them as they are."""

    @model_validator(mode="after")
    def _activation_grid_belongs_to_activations(self) -> Lsq:
        if self.activation_grid != "signed" and self.activation_bits is None:
            raise ConfigError(
                f"lsq with activation_grid {self.activation_grid} and no activation_bits; set activation_bits too, "
                f"e.g. 8, or remove activation_grid"
            )
        if self.activation_offset and self.activation_bits is None:
            raise ConfigError(
                "lsq with activation_offset and no activation_bits has no activations to offset; set activation_bits "
                "too, e.g. 4, or remove activation_offset"
            )
        if self.activation_offset and self.activation_grid == "midrise":
            raise ConfigError(
                "lsq with activation_offset has codes around that offset, and activation_grid midrise has them around "
                "0; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_bit_has_a_grid(self) -> Lsq:
        if self.weight_bits == 1 and self.grid != "midrise":
            raise ConfigError(f"lsq with weight_bits 1 and grid {self.grid} has no positive code; set grid: midrise")
        if self.activation_bits == 1 and self.activation_grid == "signed":
            raise ConfigError(
                "lsq with activation_bits 1 and activation_grid signed has no positive code; set activation_grid: "
                "midrise, or unsigned for inputs that are never negative"
            )
        return self

    @property
    def _range_of_bits(self) -> tuple[int, int]:
        return (1 if self.grid == "midrise" else 2), 8

    def holds_where_blocks_are_apart(self) -> bool:
        """Return whether steps come from weights alone, each of which is on one stage."""
        return self.activation_bits is None

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return True: stages see whole weights, and steps their whole gradient."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser with steps of its own on every target, and one on its input.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target.
        """
        from leanmill.quant.bits import bits_by_site
        from leanmill.quant.lsq.stage import LsqStage
        from leanmill.quant.scales import check_groups
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        check_groups(selected, self.type, self.group_size)
        bits = bits_by_site(selected, self.weight_bits, self.bits_per_layer, self.type)
        sites.put(
            selected,
            lambda site: LsqStage(
                site.raw_weight, bits[site.site_name], self.grid, self.granularity, self.group_size,
                start=self.weight_start, has_warmup=self.has_warmup,
            ),
        )  # fmt: skip
        rules = warmup_rules(sites, self.type, self.warmup_steps)
        if self.activation_bits is None:
            return Installation(step_rules=rules)
        from leanmill.quant.lsq.activations import LsqActivations
        from leanmill.quant.lsq.calibration import CalibrateSteps

        for site in selected:
            if site.takes_inputs:
                weight = site.raw_weight
                site.put_input(
                    LsqActivations(
                        weight.shape[-1], self.activation_bits, self.activation_grid,
                        has_offset=self.activation_offset, has_warmup=self.has_warmup, device=weight.device,
                    )
                )  # fmt: skip
        return Installation(step_rules=(CalibrateSteps(sites.model), *rules))
