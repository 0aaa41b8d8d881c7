"""Configuration of mixture of depths. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig
from leanmill.moe.mixture_of_depths.capacity import decayed_capacities, default_layers


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


_OF_ONE_METHOD = {
    "shared_router": "gamma_mod",
    "router_loss_weight": "gamma_mod",
    "protect": "gamma_mod",
    "max_capacity": "p_mod",
    "min_capacity": "p_mod",
    "weight_scale": "p_mod",
}


class MixtureOfDepths(TrainedTechniqueConfig):
    """Let a router choose which tokens a decoder block runs for; the others pass it by.

    gamma-MoD: Luo et al. 2024, arXiv:2410.13859; p-MoD: Zhang et al. 2024, arXiv:2412.04449.
    """

    type: Literal["mixture_of_depths"] = "mixture_of_depths"
    """Name of the technique."""
    method: Literal["gamma_mod", "p_mod"] = "gamma_mod"
    """How tokens are weighed, and what share of them each block gets; see the page of the technique."""
    layers: list[int] | None = None
    """Blocks that choose, by index from 0, such as those of lowest ARank (`leanmill arank`). None takes all but the
    first three and the last for gamma_mod, and those whose capacity comes to at most `max_capacity` for p_mod."""
    capacity: float = Field(default=0.5, gt=0, lt=1)
    """Share of a row's tokens that a block runs for; for p_mod its mean over depth, around which a cosine falls from
    capacity + 0.5 in the first block to capacity - 0.5 in the last."""
    max_capacity: float = Field(default=0.85, gt=0, lt=1)
    """p_mod: blocks whose capacity comes to more run for all tokens."""
    min_capacity: float = Field(default=0.15, gt=0, lt=1)
    """p_mod: the smallest capacity."""
    weight_scale: float = Field(default=0.2, gt=0, lt=1)
    """p_mod: alpha; what a block does to a token counts 1 + alpha tanh(logit)."""
    shared_router: bool = True
    """gamma_mod: one router for all blocks, or one each."""
    router_loss_weight: float = Field(default=0.01, ge=0)
    """gamma_mod: weight of the router's cross-entropy against what was chosen, a sum over blocks."""
    protect: Literal["none", "labels"] = "none"
    """gamma_mod: `labels` runs blocks for every token that has a label in training, and for `capacity` of the
    others: fine-tuning on chats, where responses have labels and prompts have none."""
    inference: Literal["router", "top_k"] | None = None
    """How tokens are chosen in evaluation. `router` lets each decide for itself (its probability is at least 0.5),
    as generating a text needs it; `top_k` takes the highest of the row as in training, so that a token's
    choice depends on later ones. None is `router` for gamma_mod and `top_k` for p_mod, whose router learns no
    decision."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        for name, method in _OF_ONE_METHOD.items():
            # By value: a recipe that a checkpoint holds names every key.
            if method != self.method and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"mixture_of_depths.{name} belongs to method {method}, and method is {self.method}; remove it, "
                    f"or set method: {method}"
                )
        if self.min_capacity > self.max_capacity:
            raise ConfigError(
                f"mixture_of_depths.min_capacity={self.min_capacity} is above max_capacity={self.max_capacity}; "
                f"set min_capacity: {self.max_capacity} or less"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(
                f"mixture_of_depths.layers={self.layers} must name at least one block, each once; type e.g. layers: "
                f"[3, 4, 5], or remove it"
            )
        self._check_inference()
        return self

    def _check_inference(self) -> None:
        if self.inference == "router" and (self.method == "p_mod" or self.router_loss_weight == 0):
            raise ConfigError(
                "mixture_of_depths.inference=router needs a router that is trained to decide, and without the "
                "cross-entropy of gamma_mod none is; set inference: top_k"
            )
        if self.protect == "labels" and self.settled_inference == "top_k":
            raise ConfigError(
                "mixture_of_depths.protect=labels keeps tokens by their labels in training, which evaluation has not; "
                "set inference: router and a router_loss_weight above 0, so that the router learns to keep them"
            )

    @property
    def settled_inference(self) -> Literal["router", "top_k"]:
        """`inference`, None replaced."""
        if self.inference is not None:
            return self.inference
        return "router" if self.method == "gamma_mod" and self.router_loss_weight > 0 else "top_k"

    def capacities(self, num_layers: int) -> dict[int, float]:
        """Return the share of tokens by block, of the blocks that choose.

        Raises:
            ConfigError: The model has no such block, or none is left to choose.
        """
        decayed = decayed_capacities(num_layers, self.capacity, self.min_capacity, self.max_capacity)
        layers = self.layers
        if layers is None:
            layers = sorted(decayed) if self.method == "p_mod" else default_layers(num_layers)
        if not layers or not 0 <= min(layers) <= max(layers) < num_layers:
            given = "none of" if not layers else f"layers {layers} of"
            raise ConfigError(
                f"mixture_of_depths would choose in {given} the {num_layers} blocks of the model; set layers to "
                f"indices from 0 to {num_layers - 1}, e.g. layers: [{num_layers // 2}]"
            )
        if self.method == "gamma_mod":
            return dict.fromkeys(layers, self.capacity)
        return {layer: decayed.get(layer, self.max_capacity) for layer in layers}

    def token_shares(self, num_layers: int) -> Mapping[int, float]:
        """Return what share of the tokens blocks run for; protected ones come on top."""
        return self.capacities(num_layers)

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the blocks that choose.

        Raises:
            ConfigError: The model has no such block, a block holds no attention, or it takes arguments that
                cannot be cut down to the chosen tokens.
        """
        from leanmill.moe.mixture_of_depths.install import install

        install(
            sites,
            context.ledger,
            self.capacities,
            weighing="softmax" if self.method == "gamma_mod" else "tanh",
            weight_scale=self.weight_scale,
            is_shared=self.shared_router and self.method == "gamma_mod",
            router_loss_weight=self.router_loss_weight if self.method == "gamma_mod" else 0.0,
            protects_labels=self.protect == "labels",
            inference=self.settled_inference,
        )
        return Installation()
