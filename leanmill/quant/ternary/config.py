"""Configuration of ternary weights. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Ternary(TechniqueConfig):
    """Weights in {-s, 0, s}, trained straight-through.

    BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), ternary weight networks (Li et al.
    2016, arXiv:1605.04711) and the least-squares choice of both scale and threshold.
    """

    type: Literal["ternary"] = "ternary"
    """Name of the technique."""
    scale: Literal["absmean", "twn", "mse"] = "absmean"
    """`absmean`: s = mean |W|, round(W / s) cut to -1, 0, 1. `twn`: threshold 0.7 mean |W|, s the
    mean of what exceeds it. `mse`: s and threshold that minimise the squared error, by sorting."""
    granularity: Literal["tensor", "row"] = "tensor"
    """What shares a scale: a whole weight (each expert of a stacked one), or one output row."""
    activation_bits: Literal[8] | None = None
    """8 rounds each token of the input to 8-bit codes by its largest magnitude, as BitNet b1.58 does; None
    leaves activations alone (Spectra's TriLM)."""
    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a quantiser stage on every target."""
        from leanmill.quant.ternary.stage import Int8Activations, TernaryStage

        selected = sites.select(self.targets, self.exclude)
        sites.put(selected, lambda site: TernaryStage(self.scale, self.granularity))
        if self.activation_bits is not None:
            for site in selected:
                site.put_input(Int8Activations())
        return Installation()
