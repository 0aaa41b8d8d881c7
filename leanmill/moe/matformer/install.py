"""Putting nested widths around the down projections of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from leanmill.core.around import put_around
from leanmill.core.branches import plain_modules
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.places import Place
from leanmill.core.rules import StepRule
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.matformer.around import NestedWidth
from leanmill.moe.matformer.rules import AllWidths, DrawnWidth


def install_one(
    sites: Sites, context: InstallContext, granularities: Sequence[int], probabilities: Sequence[float] | None
) -> list[StepRule]:
    """Let every step train one sub-model; see `MatFormer` for the arguments."""
    if context.seed is None:
        raise ConfigError("matformer draws a width each step and was given no seed; set `seed: 0` in the recipe")
    arounds = list(_put(sites, granularities, num_parts=1))
    weights = probabilities or [1.0] * len(granularities)
    return [DrawnWidth(sites.model, arounds, granularities, weights, context.seed)]


def install_all(sites: Sites, granularities: Sequence[int]) -> list[StepRule]:
    """Let every step train all sub-models; see `MatFormer`."""
    for around in _put(sites, granularities, num_parts=len(granularities)):
        for part, granularity in zip(around.widths, granularities, strict=True):
            part.fill_(around.width // granularity)
    return [AllWidths(sites.model, len(granularities))]


def _put(sites: Sites, granularities: Sequence[int], *, num_parts: int) -> Iterator[NestedWidth]:
    for place in sites.modules("mlp"):
        name = _down_projection(place)
        # A site from now on, so that no later technique puts another module in its place.
        (site,) = sites.select([name])
        assert isinstance(site, nn.Linear)
        for granularity in granularities:
            if site.in_features % granularity:
                raise ConfigError(
                    f"{name}: matformer.granularities has {granularity}, which does not divide the MLP's "
                    f"{site.in_features} neurons; choose divisors of {site.in_features}"
                )
        around = NestedWidth(site.in_features, num_parts)
        put_around(site, around)
        yield around


def _down_projection(place: Place) -> str:
    """Name of the layer that all neurons of an MLP enter.

    Raises:
        ConfigError: There is none, or several could be it.
    """
    linears = {path: module for path, module in plain_modules(place.module) if isinstance(module, nn.Linear)}
    stacked = [path for path, p in place.module.named_parameters() if p.dim() > 2]
    found = [
        path
        for path, down in linears.items()
        if len(linears) > 1
        and all(
            (other.in_features, other.out_features) == (down.out_features, down.in_features)
            for key, other in linears.items()
            if key != path
        )
    ]
    if stacked or len(found) != 1 or linears[found[0]].in_features == linears[found[0]].out_features:
        what = "experts" if stacked else f"layers {', '.join(linears) or 'of its own kind'}"
        raise ConfigError(
            f"matformer: {place.name} has {what}, and needs an MLP of linear layers into and out of its neurons; "
            f"choose a family such as llama, or another width"
        )
    return clean_name(f"{place.name}.{found[0]}")
