"""The parts of a model that are small, or stand apart: biases, norms, head, embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.core.sites import Sites, clean_name


def names_of(sites: Sites, parts: Sequence[str] | None) -> frozenset[str]:
    """Return the names, in the plain model, of the parameters of some parts.

    Args:
        sites: Of the model.
        parts: `biases`, `norms`, `head`, `embeddings`; None is norms, and biases where there are some.

    Raises:
        ConfigError: The model has none of a part, or it is tied to a parameter of none of the parts.
    """
    found = {part: list(_parameters(sites, part)) for part in parts or ("norms", "biases")}
    for part, parameters in found.items():
        if not parameters and parts is not None:
            others = [other for other in ("biases", "norms", "head", "embeddings") if list(_parameters(sites, other))]
            raise ConfigError(f"perp.train: this model has no {part}; it has {', '.join(others)}")
    chosen = {id(parameter) for parameters in found.values() for parameter in parameters}
    _check_ties(sites, found)
    return frozenset(clean_name(name) for name, p in sites.model.named_parameters() if id(p) in chosen)


def _parameters(sites: Sites, part: str) -> Iterator[nn.Parameter]:
    model: Any = sites.model
    if part == "biases":
        yield from _biases(sites)
    elif part == "norms":
        for _, _, module in find_modules(model, "norm"):
            yield from module.parameters(recurse=False)
    else:
        weights = {"head": "head", "embeddings": "embedding"}[part]
        for candidate in sites.candidates.values():
            if candidate.kind == weights:
                yield getattr(model.get_submodule(candidate.module_path), candidate.parameter_name)


def _biases(sites: Sites) -> Iterable[nn.Parameter]:
    for candidate in sites.candidates.values():
        bias = getattr(sites.model.get_submodule(candidate.module_path), "bias", None)
        if candidate.kind in ("linear", "head") and isinstance(bias, nn.Parameter):
            yield bias


def _check_ties(sites: Sites, found: dict[str, list[nn.Parameter]]) -> None:
    for part, other in (("head", "embeddings"), ("embeddings", "head")):
        if part in found and other not in found:
            shared = {id(p) for p in found[part]} & {id(p) for p in _parameters(sites, other)}
            if shared:
                raise ConfigError(
                    f"perp.train: {part} and {other} are tied (one parameter) in this model; list both, or leave out "
                    f"{part}"
                )
