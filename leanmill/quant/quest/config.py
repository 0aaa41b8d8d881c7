"""Configuration of QuEST. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites

MAX_BLOCK_SIZE = 128
"""The paper's block of the Hadamard transform."""


class Quest(WeightTechniqueConfig):
    """Weights and activations of 1 to 8 bits through a Hadamard transform (Panferov et al. 2025, arXiv:2502.05003).

    Both operands are rotated, so the product is that of the unrotated ones; each row or token is
    rounded to 2^b levels reaching to the clip that is best for a Gaussian of its RMS; the gradient
    passes where the rounding error is at most half a step.
    """

    type: Literal["quest"] = "quest"
    """Name of the technique."""
    weight_bits: int = Field(default=4, ge=1, le=8)
    """Bits of a weight."""
    activation_bits: int | None = Field(default=4, ge=1, le=8)
    """Bits of an activation; None rotates activations without rounding them."""
    block_size: int | None = Field(default=None, ge=2, le=4096)
    """Neighbours that one Hadamard transform mixes, a power of two; None takes the largest up to 128
    (the paper's) that divides a weight's last dim."""

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return True: stages see whole weights and whole activations."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put rotation and quantiser on every target and on its input.

        Raises:
            ConfigError: No block size divides the last dim of a target.
        """
        from leanmill.quant.quest.stage import HadamardInput, HadamardWeight, QuestInput, QuestWeight

        for site in sites.select(self.targets, self.exclude):
            block_size = self._block_size(site.site_name, site.raw_weight.shape[-1])
            site.put(HadamardWeight(block_size))
            site.put(QuestWeight(self.weight_bits))
            if self.activation_bits is None:
                site.put_input(HadamardInput(block_size))
            else:
                site.put_input(QuestInput(self.activation_bits, block_size))
        return Installation()

    def _block_size(self, name: str, num_in: int) -> int:
        largest = num_in & -num_in
        block_size = self.block_size or min(largest, MAX_BLOCK_SIZE)
        if block_size < 2 or block_size & (block_size - 1) or num_in % block_size:
            allowed = f"set block_size to a power of two up to {largest}, or " if largest > 1 else ""
            raise ConfigError(
                f"{name}: no Hadamard transform of block_size {self.block_size or 'auto'} fits its {num_in} inputs; "
                f"{allowed}add {name!r} to quest.exclude"
            )
        return block_size
