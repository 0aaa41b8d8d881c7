"""Configuration of binary weights. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.technique import Installation, InstallContext
from leanmill.quant.config import BitNetInputs, SharedScales, Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


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

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser stage on every target, and what its input goes through.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target.
        """
        from leanmill.quant.binary.stage import BinaryInt8, BinaryNorm, BinaryStage
        from leanmill.quant.inputs import put_inputs
        from leanmill.quant.scales import check_groups
        from leanmill.quant.sharing import Sharing
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        check_groups(selected, self.type, self.group_size)
        sharing = Sharing(self.granularity, self.group_size)
        sites.put(
            selected,
            lambda site: BinaryStage(
                sharing, center=self.center, has_warmup=self.has_warmup, device=site.raw_weight.device
            ),
        )
        put_inputs(
            selected,
            norm=BinaryNorm if self.input_norm else None,
            rounding=BinaryInt8 if self.activation_bits else None,
            has_warmup=self.has_warmup,
        )
        return Installation(step_rules=warmup_rules(sites, self.type, self.warmup_steps))
