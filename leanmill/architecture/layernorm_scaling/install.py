"""Putting LayerNorm scaling around the norms of a model."""

from __future__ import annotations

from torch import nn

from leanmill.architecture.layernorm_scaling.around import ScaledNorm
from leanmill.core.dataflow import pre_norms
from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites


def install(sites: Sites, *, starts_folded: bool) -> None:
    """Scale the output of every pre-norm of block l of 1 to L by 1 / sqrt(l).

    Args:
        sites: Of the model.
        starts_folded: Whether weights that are loaded have the factor in them already.

    Raises:
        ConfigError: No norm feeds attention or MLP, or one has no weight.
    """
    model, fed = sites.model, pre_norms(sites.model)
    places = [place for place in sites.modules("norm") if id(place.module) in fed]
    if not places:
        raise ConfigError(
            f"layernorm_scaling scales norms before attention and MLP, and model type {model.config.model_type!r} "  # type: ignore[union-attr]
            f"has none, since it normalises after them or folds several layers into a block; choose a family with "
            f"pre-norms, e.g. llama, or remove layernorm_scaling"
        )
    for place in places:
        if not isinstance(getattr(place.module, "weight", None), nn.Parameter):
            raise ConfigError(
                f"{place.name} has no weight, in which an export puts layernorm_scaling's factor, so no plain model of "
                f"this family computes what would be trained; choose another family, e.g. llama"
            )
        assert place.layer is not None
        place.around(ScaledNorm(place.name, (place.layer + 1) ** -0.5, starts_folded=starts_folded))
