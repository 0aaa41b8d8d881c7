"""Configuration of binary weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.lengths import steps_of
from leanmill.core.technique import Installation, InstallContext
from leanmill.quant.config import BitNetInputs, SharedScales, Warmup


if TYPE_CHECKING:
    from torch import Tensor

    from leanmill.core.sites import Sites
    from leanmill.quant.binary.stage import BinaryStage
    from leanmill.quant.sharing import Sharing


class Binary(BitNetInputs, Warmup, SharedScales):
    """Weights in {-s, s}, s the mean magnitude, trained straight-through.

    BitNet (Wang et al. 2023, arXiv:2310.11453) takes signs around the mean of a weight, and so does Spectra's BiLM
    (Kaushal et al. 2024, arXiv:2407.12327); XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279) takes those around
    zero with one s a row: `granularity: row`, `center: false`.
    """

    type: Literal["binary"] = "binary"
    """Name of the technique."""
    granularity: Literal["tensor", "row", "group"] = "tensor"
    """What shares a scale: a whole weight (each expert of a stacked one), an output row, or
    `group_size` neighbours of a row."""
    center: bool = True
    """Take signs around the mean of what shares a scale, so that half of them are positive; false takes them
    around zero."""

    num_bases: int = Field(default=1, ge=1, le=4)
    """Signs with an s of their own that are added up, each of what those before left over (BinaryDM: Zheng et al.
    2024, arXiv:2404.05662)."""
    bases_until: int | float | None = Field(default=None, gt=0)
    """When all but the first of the bases go, in steps (int) or as a share of the run (float below 1), as in
    BinaryDM; None keeps them."""
    salient: float | None = Field(default=None, gt=0, lt=1)
    """Share of each matrix, by largest loaded magnitude, that is kept frozen at 8 bits beside the signs (PB-LLM: Shang
    et al. 2023, arXiv:2310.00034, with 0.1, `granularity: row` and `center: false`); None keeps none."""
    frequency: float | None = Field(default=None, gt=0)
    """Signs are those of sin(frequency w), and the gradient is that wave's (BiPer: Vargas et al. 2024,
    arXiv:2404.01278, with 20), without `center`; None takes those of w straight-through."""

    @model_validator(mode="after")
    def _options_go_together(self) -> Binary:
        kinds = {"num_bases": self.num_bases > 1, "salient": self.salient, "frequency": self.frequency}
        given = [key for key, value in kinds.items() if value]
        if len(given) > 1:
            raise ConfigError(f"binary.{given[0]} and binary.{given[1]} are different methods; remove one of them")
        if self.frequency and self.center:
            raise ConfigError("binary.frequency has no center: waves stand around 0; set center: false too")
        if self.bases_until is not None and self.num_bases == 1:
            raise ConfigError("binary.bases_until without further bases; set num_bases: 2, or remove it")
        if isinstance(self.bases_until, float) and self.bases_until >= 1:
            raise ConfigError(
                f"binary.bases_until={self.bases_until}: a float is a share of the run and must be below 1; type "
                f"bases_until: {round(self.bases_until)} for steps"
            )
        return self

    def problems_in_a_run_of(self, num_steps: int) -> Iterator[str]:
        yield from super().problems_in_a_run_of(num_steps)
        end = steps_of(self.bases_until or 0, num_steps, at_least=1)
        if end >= max(1, num_steps):
            yield (
                f"binary.bases_until={self.bases_until} is not over before the last of {num_steps} steps, so no step "
                f"would train what is exported; set it below {num_steps}, e.g. 0.5, or leave it out"
            )

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser stage on every target, and what its input goes through.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target.
        """
        from leanmill.quant.binary.stage import BinaryInt8, BinaryNorm
        from leanmill.quant.bits import LowerBits
        from leanmill.quant.inputs import put_inputs
        from leanmill.quant.scales import check_groups
        from leanmill.quant.sharing import Sharing
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        check_groups(selected, self.type, self.group_size)
        sharing = Sharing(self.granularity, self.group_size)
        sites.put(selected, lambda site: self._stage(site.raw_weight, sharing))
        put_inputs(
            selected,
            norm=BinaryNorm if self.input_norm else None,
            rounding=BinaryInt8 if self.activation_bits else None,
            has_warmup=self.has_warmup,
        )
        rules = list(warmup_rules(sites, self.type, self.warmup_steps))
        if self.bases_until is not None:
            names = [site.site_name for site in selected]
            rules.append(LowerBits(sites.model, self.type, names, [(self.num_bases, self.bases_until)]))
        return Installation(step_rules=rules)

    def _stage(self, weight: Tensor, sharing: Sharing) -> BinaryStage:
        from leanmill.quant.binary.stage import BinaryStage, PeriodicStage, SalientStage

        if self.salient is not None:
            return SalientStage(weight, self.salient, sharing, center=self.center, has_warmup=self.has_warmup)
        if self.frequency is not None:
            return PeriodicStage(self.frequency, sharing, has_warmup=self.has_warmup, device=weight.device)
        num_bases = self.num_bases if self.bases_until is None else 1
        return BinaryStage(
            sharing, center=self.center, num_bases=num_bases, has_warmup=self.has_warmup, device=weight.device
        )
