"""Configuration of ternary weights. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig
from leanmill.quant.config import BitNetInputs, Warmup


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Ternary(BitNetInputs, Warmup, WeightTechniqueConfig):
    """Weights in {-s, 0, s}, trained straight-through.

    BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), ternary weight networks (Li et al.
    2016, arXiv:1605.04711) and the least-squares choice of both scale and threshold. BitNet whole is
    `activation_bits: 8` with `input_norm: true`; TriLM (Kaushal et al. 2024, arXiv:2407.12327) is neither, with
    `schedule.drop_at` and `schedule.weight_decay_until`.
    """

    type: Literal["ternary"] = "ternary"
    """Name of the technique."""
    scale: Literal["absmean", "twn", "mse"] = "absmean"
    """`absmean`: s = mean |W|, round(W / s) cut to -1, 0, 1. `twn`: threshold 0.7 mean |W|, s the
    mean of what exceeds it. `mse`: s and threshold that minimise the squared error, by sorting."""
    granularity: Literal["tensor", "row"] = "tensor"
    """What shares a scale: a whole weight (each expert of a stacked one), or one output row."""

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return True: stages see whole weights and whole activations."""
        return True

    def holds_where_blocks_are_apart(self) -> bool:
        """Return True: scales come from weights, each of which is on one stage."""
        return True

    def holds_where_rows_are_shared(self) -> bool:
        """Return True: weights are whole, and each token has a scale of its own."""
        return True

    def holds_where_workers_drift(self) -> bool:
        """Return True: scales come from the weights that travel."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser stage on every target, and what its input goes through."""
        from leanmill.quant.inputs import put_inputs
        from leanmill.quant.ternary.stage import Int8Activations, TernaryNorm, TernaryStage
        from leanmill.quant.warmup import warmup_rules

        selected = sites.select(self.targets, self.exclude)
        sites.put(
            selected,
            lambda site: TernaryStage(
                self.scale, self.granularity, has_warmup=self.has_warmup, device=site.raw_weight.device
            ),
        )
        put_inputs(
            selected,
            norm=TernaryNorm if self.input_norm else None,
            rounding=Int8Activations if self.activation_bits else None,
            has_warmup=self.has_warmup,
        )
        return Installation(step_rules=warmup_rules(sites, self.type, self.warmup_steps))
