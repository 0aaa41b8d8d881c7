"""Putting mixture of depths around the blocks of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from leanmill.core.around import arounds, put_around
from leanmill.core.dataflow import check_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.places import Place, find_modules
from leanmill.core.sites import Sites
from leanmill.moe.mixture_of_depths.around import RoutedBlock, see
from leanmill.moe.mixture_of_depths.choice import CUT_ARGUMENTS
from leanmill.moe.mixture_of_depths.router import DepthRouter, SharedRouter, Weighing


_TECHNIQUE = RoutedBlock.technique


def install(
    sites: Sites,
    ledger: Ledger,
    capacities: Callable[[int], Mapping[int, float]],
    *,
    weighing: Weighing,
    weight_scale: float,
    is_shared: bool,
    router_loss_weight: float,
    protects_labels: bool,
    inference: Literal["router", "top_k"],
) -> None:
    """Let blocks choose their tokens; see `MixtureOfDepths` for the arguments.

    Args:
        sites: Of the model.
        ledger: Takes the router's loss.
        capacities: Given the number of blocks, the share of tokens of each that chooses.
        weighing: See `DepthRouter`.
        weight_scale: See `DepthRouter`.
        is_shared: Whether all blocks have one router.
        router_loss_weight: Of a block's loss in the objective.
        protects_labels: See `RoutedBlock`.
        inference: See `RoutedBlock`.

    Raises:
        ConfigError: See `MixtureOfDepths.install`.
    """
    check_blocks(sites.model, _TECHNIQUE, tensors=CUT_ARGUMENTS)
    places = sites.modules("block")
    shares = capacities(len(places))
    _check(sites, places, shares)
    if protects_labels:
        _check_dense(sites, shares)
    hidden_size: int = sites.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    device = next(sites.model.parameters()).device

    def new_router() -> DepthRouter:
        return DepthRouter(hidden_size, weighing, weight_scale).to(device)

    shared = new_router() if is_shared else None
    if shared is not None:
        put_around(sites.model.base_model, SharedRouter(shared))  # type: ignore[arg-type]
    blocks = []
    for layer, capacity in shares.items():
        loss = router_loss_weight
        blocks.append(
            RoutedBlock(
                new_router() if shared is None else shared,
                owns_router=shared is None,
                argument_names=list(inspect.signature(type(places[layer].module).forward).parameters)[2:],
                capacity=capacity,
                account=ledger.open(f"{_TECHNIQUE}/{layer}", per="micro_batch", weight=loss) if loss else None,
                protects_labels=protects_labels,
                inference=inference,
            )
        )
        places[layer].around(blocks[-1])
    ledger.before_forward(partial(see, blocks))


def _check_dense(sites: Sites, shares: Mapping[int, float]) -> None:
    """Refuse routers of experts inside: rows that choose fewer tokens are filled up with some that would be counted."""
    for name, layer, _ in find_modules(sites.model, "router"):
        if layer in shares:
            raise ConfigError(
                f"mixture_of_depths.protect=labels fills rows up with tokens that {name} would route and count; set "
                f"protect: none, or layers to blocks without experts"
            )


def _check(sites: Sites, places: list[Place], shares: Mapping[int, float]) -> None:
    with_attention = {place.layer for place in sites.modules("attention")}
    for layer in shares:
        if layer not in with_attention:
            raise ConfigError(
                f"mixture_of_depths cannot cut the rows of block {layer}, which mixes tokens by other means than "
                f"attention; set layers to some of {sorted(x for x in with_attention if x is not None)}"
            )
        if any(around.technique == _TECHNIQUE for around in arounds(places[layer].module)):
            raise ConfigError("mixture_of_depths is listed twice; keep one entry, whose `layers` are those of both")
