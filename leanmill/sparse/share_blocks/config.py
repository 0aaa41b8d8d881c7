"""Sharing weights between neighbouring blocks. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig


class ShareBlocks(SurgeryConfig):
    """Let neighbouring blocks share attention and MLP, each with norms of its own: FoldGPT's grouped sharing.

    Liu et al. 2024, arXiv:2407.00928; `weights: mean` and adapters as in Bae et al. 2024, arXiv:2410.20672.
    """

    type: Literal["share_blocks"] = "share_blocks"
    """Name of the pass."""
    group_size: Annotated[int, Field(ge=2, strict=True)] | list[Annotated[int, Field(ge=1, strict=True)]]
    """How many neighbours share; or of each group in turn from the first block on: `[1, 3, 3, 1]`. With a number a
    last group may be smaller."""
    weights: Literal["first", "mean"] = "first"
    """What a group's weights begin as: those of its first block, as in FoldGPT, or the mean of all."""
    adapter_rank: int | None = Field(default=None, ge=1)
    """Rank of adapters that give each layer back what sharing took, a truncated singular value decomposition of its
    weights less the shared ones: a Relaxed Recursive Transformer (Bae et al.). At a matrix's smaller side it is whole.
    None adds none."""
    first_layer: int = Field(default=0, ge=0)
    """With a number: the blocks before it stay by themselves."""
    last_layers: int = Field(default=0, ge=0)
    """With a number: as many blocks at the end stay by themselves."""

    @model_validator(mode="after")
    def _shares(self) -> ShareBlocks:
        if not isinstance(self.group_size, list):
            return self
        if self.first_layer or self.last_layers:
            raise ConfigError(
                "share_blocks: first_layer and last_layers are for a number as group_size; a list says it all, e.g. "
                "group_size: [1, 3, 3, 1]"
            )
        if max(self.group_size, default=1) < 2:
            raise ConfigError(
                f"share_blocks: group_size={self.group_size} lets no two blocks share; type e.g. group_size: 2"
            )
        return self

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.share_blocks.surgeon import Sharing

        return Sharing(
            group_size=self.group_size,
            takes_mean=self.weights == "mean",
            adapter_rank=self.adapter_rank or 0,
            first_layer=self.first_layer,
            last_layers=self.last_layers,
        )
