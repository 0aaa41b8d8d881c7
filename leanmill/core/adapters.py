"""Turning adapters off: a model as it is without the deltas in its weights and the branches beside its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from leanmill.core.branches import branch_modules, branched_layers
from leanmill.core.site import Site
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Leave deltas and branches out of what `model` computes inside the context; nothing is written."""
    sites = _sites_with_deltas(model)
    # PEFT's own switch beside this flag also freezes what it switches off.
    layers: list[Any] = [layer for _, layer in branched_layers(model)]
    for site in sites:
        site.leaves_deltas_out = True
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for site in sites:
            site.leaves_deltas_out = False
        for layer in layers:
            layer._disable_adapters = False


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of what `adapters_off` leaves out."""
    for site in _sites_with_deltas(model):
        for stage in site.weight_stages():
            if stage.slot is Slot.DELTA:
                yield from stage.parameters()
    for _, layer in branched_layers(model):
        for module in branch_modules(layer):
            yield from module.parameters(recurse=False)


def _sites_with_deltas(model: nn.Module) -> list[Site]:
    return [site for _, site in iter_sites(model) if site.stage(Slot.DELTA) is not None]
