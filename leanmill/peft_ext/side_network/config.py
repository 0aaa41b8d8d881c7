"""Configuration of side networks. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class SideNetworkTechnique(TrainedTechniqueConfig):
    """Freeze the model and train a network beside it that reads its blocks' hidden states.

    No gradient goes back through the blocks that are read, which keep nothing for one. UniPT: Diao et al. 2023,
    arXiv:2308.14316. SHERL: Diao et al. 2024, arXiv:2407.07523.
    """

    type: Literal["side_network"] = "side_network"
    """Name of the technique."""
    method: Literal["unipt", "sherl"] = "unipt"
    """`unipt` stands behind the last block; `sherl` before the last `late_blocks`, through which gradients go."""
    size: int | None = Field(default=None, ge=1)
    """Features of the network; None is half of the model's hidden size."""
    every: int = Field(default=1, ge=1)
    """It reads the embeddings and what every so many blocks after them return, beside those it stands behind."""
    late_blocks: int | None = Field(default=None, ge=1)
    """For `method: sherl`: how many of the last blocks go on from what the network makes; None is 1."""
    keeps_base: bool = True
    """Whether the model's own hidden states are added to what the network makes, which then starts as nothing; false
    trains from a random start, as the released code does."""

    @model_validator(mode="after")
    def _has_late_blocks(self) -> SideNetworkTechnique:
        if self.method == "unipt" and self.late_blocks is not None:
            raise ConfigError(
                "side_network.late_blocks belongs to method: sherl; unipt stands behind all blocks. Remove it, or set "
                "method: sherl"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand behind the last block, or before the late ones, and freeze the model.

        Raises:
            ConfigError: The model has too few blocks, or such as return more than hidden states.
        """
        from leanmill.peft_ext.side_network.install import install

        install(
            sites,
            method=self.method,
            size=self.size,
            every=self.every,
            late_blocks=self.late_blocks or 1,
            keeps_base=self.keeps_base,
        )
        return Installation(freeze_base=True)
