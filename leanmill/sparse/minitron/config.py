"""Minitron. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig
from leanmill.sparse.structured.targets import Target


_TARGETS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")


class Minitron(SurgeryConfig):
    """Prune channels, heads, neurons and layers by what flows through them.

    Muralidharan et al. 2024, arXiv:2407.14679. Sizes are those of the model to be, as its transformers configuration
    names them: a number, or a share of what there is. What is not given stays. Distil afterwards: a model that is cut
    much smaller is of little use as it is.
    """

    type: Literal["minitron"] = "minitron"
    """Name of the pass."""
    hidden_size: Target = None
    """Channels of the residual stream."""
    intermediate_size: Target = None
    """Neurons of each MLP; for dense models."""
    num_attention_heads: Target = None
    """Query heads of each layer, as many from each key-value head that stays."""
    num_key_value_heads: Target = None
    """Key-value heads of each layer, which go with their query heads. None keeps them all where several query heads
    share one, and has one for each query head that stays where none do."""
    num_hidden_layers: Target = None
    """Decoder layers."""
    multiple_of: int = Field(default=8, ge=1)
    """Channels and neurons that are given as a share become a multiple of this, the nearest."""
    head_importance: Literal["activations", "gradients"] = "activations"
    """`activations`: the l2 norm of what a head puts out. `gradients`: how much the loss changes with a factor on it
    (Michel et al. 2019, arXiv:1905.10650), for which the whole model is loaded in fp32."""
    depth_importance: Literal["block_influence", "loss"] = "block_influence"
    """`block_influence`: 1 minus the cosine of a layer's input and output. `loss`: the loss without the layer, which
    takes as many forwards as there are layers."""
    norms: Literal["kept_channels", "all_channels"] = "kept_channels"
    """What norms over fewer channels divide by: the root mean square of those that are kept, as in the paper's models,
    or what it would be with the others at zero, for which their weights and eps are scaled."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Minitron:
        if all(getattr(self, name) is None for name in _TARGETS):
            raise ConfigError(f"minitron: nothing is asked for; give at least one of {', '.join(_TARGETS)}")
        if self.norms == "all_channels" and self.hidden_size is None:
            raise ConfigError("minitron: norms: all_channels is about channels that go; give hidden_size, or remove it")
        if self.depth_importance == "loss" and self.num_hidden_layers is None:
            raise ConfigError(
                "minitron: depth_importance is about layers that go; give num_hidden_layers, or remove it"
            )
        if (
            self.head_importance == "gradients"
            and self.num_attention_heads is None
            and self.num_key_value_heads is None
        ):
            raise ConfigError(
                "minitron: head_importance is about heads that go; give num_attention_heads or num_key_value_heads, or "
                "remove it"
            )
        return self

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.minitron.surgeon import MinitronSurgeon

        return MinitronSurgeon(
            targets={name: getattr(self, name) for name in _TARGETS},
            multiple_of=self.multiple_of,
            by_gradients=self.head_importance == "gradients",
            by_loss=self.depth_importance == "loss",
            scales_norms=self.norms == "all_channels",
        )
