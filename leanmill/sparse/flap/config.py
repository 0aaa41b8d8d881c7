"""FLAP. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig
from leanmill.sparse.structured.targets import Target


_TARGETS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


class Flap(SurgeryConfig):
    """Prune heads and neurons whose output fluctuates least, and put their mean into a bias.

    An et al. 2023, arXiv:2312.11983. What goes is replaced by a constant, so the model is of use without training.
    With sizes every layer keeps as many, and the model stays of its family, which must have biases there. With
    `sparsity` layers and their halves share out what goes, and the model becomes a `pruned_llama`.
    """

    type: Literal["flap"] = "flap"
    """Name of the pass."""
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of the parameters of attentions and MLPs that goes, wherever heads and neurons fluctuate least by the
    standard of their layer. Instead of sizes."""
    intermediate_size: Target = None
    """Neurons of each MLP: a number, or a share of what there is. None keeps all."""
    num_attention_heads: Target = None
    """Query heads of each layer, as many from each key-value head that stays."""
    num_key_value_heads: Target = None
    """Key-value heads of each layer, which go with their query heads. None keeps them all where several query heads
    share one, and has one for each query head that stays where none do."""
    multiple_of: int = Field(default=8, ge=1)
    """Neurons that are given as a share become a multiple of this, the nearest."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Flap:
        if all(getattr(self, name) is None for name in (*_TARGETS, "sparsity")):
            raise ConfigError(f"flap: nothing is asked for; give at least one of {', '.join(_TARGETS)}, or sparsity")
        if self.sparsity is not None and any(getattr(self, name) is not None for name in _TARGETS):
            raise ConfigError(f"flap: sparsity stands instead of sizes; remove it, or {', '.join(_TARGETS)}")
        return self

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.flap.adaptive import AdaptiveFlapSurgeon
        from leanmill.sparse.flap.surgeon import FlapSurgeon
        from leanmill.sparse.structured.targets import Targets

        if self.sparsity is not None:
            return AdaptiveFlapSurgeon(self.sparsity)
        asked = {name: getattr(self, name) for name in _TARGETS}
        return FlapSurgeon(Targets(technique="flap", asked=asked, multiple_of=self.multiple_of))
