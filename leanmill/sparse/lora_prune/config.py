"""Configuration of LoRAPrune. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class LoraPrune(TechniqueConfig):
    """Prune heads and neurons while `lora` trains (LoRAPrune, Zhang et al. 2023, arXiv:2305.18403).

    How much the loss minds a weight is estimated from the gradients of the adapters, so no gradient of a frozen
    weight is computed or kept. More and more of every layer is masked; the pass `remove_zeros` cuts it out afterwards.
    """

    type: Literal["lora_prune"] = "lora_prune"
    """Name of the technique."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Share of a layer's key-value heads, with their query heads, and of its neurons that is masked in the end; numbers
    are rounded down."""
    parts: Literal["both", "heads", "neurons"] = "both"
    """What is masked."""
    begin: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run, from its start, in which nothing is."""
    end: float = Field(default=0.9, gt=0, le=1)
    """Share of the run after which `sparsity` is reached; between the two it grows cubically."""
    update_every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between updates of the masks; the last one comes at `end`."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean of importance: what the old one counts for in a step."""
    spared_first: float = Field(default=0.1, ge=0, lt=1)
    """Share of the layers, from the first on and rounded down, of which nothing is masked."""
    spared_last: int = Field(default=1, ge=0)
    """Layers at the end of which nothing is masked."""

    @model_validator(mode="after")
    def _fits_together(self) -> LoraPrune:
        if self.begin >= self.end:
            raise ConfigError(
                f"lora_prune.begin {self.begin:g} is not before end {self.end:g}; set begin below {self.end:g}"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask that keeps everything, for now, on every matrix of the layers that are not spared.

        Raises:
            ConfigError: Another family, or no layer is left.
        """
        from leanmill.sparse.lora_prune.rule import PruneByAdapters
        from leanmill.sparse.lora_prune.stage import put_masks
        from leanmill.sparse.schedule import GrowingSparsity, Interval
        from leanmill.sparse.structured.widths import widths_of

        sizes, widths = widths_of(self.type, sites.model.config)
        layers = range(int(sizes.layers * self.spared_first), sizes.layers - self.spared_last)
        if not layers:
            raise ConfigError(
                f"lora_prune spares all {sizes.layers} layers of the model; lower spared_first or spared_last"
            )
        parts = ("heads", "neurons") if self.parts == "both" else (self.parts,)
        put_masks(sites, layers, parts, widths, sizes.head_dim)
        schedule = GrowingSparsity(
            initial=0.0,
            final=self.sparsity,
            interval=Interval(begin=self.begin, end=self.end),
            every_steps=self.update_every_steps,
        )
        return Installation(step_rules=(PruneByAdapters(sites.model, schedule, self.smoothing),))
