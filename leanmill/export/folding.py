"""Turning a model with sites and adapters into the plain model that computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.around import arounds, take_off
from leanmill.core.branches import base_of, branched_layers, forget_branches, merged
from leanmill.core.errors import ConfigError
from leanmill.core.site import ExpertSite, Site
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.core.transposed import as_stored


def reshaping_stages(module: nn.Module) -> list[str]:
    """Names of the techniques that mask or quantise the weight of `module`, if it is a site."""
    if not isinstance(module, Site):
        return []
    stages = [module.stage(slot) for slot in (Slot.MASK, Slot.QUANT)]
    return [stage.technique for stage in stages if stage is not None]


@torch.no_grad()
def folded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every site folded, by the plain name of its parameter."""
    return {site.weight_name: site.folded_weight().detach().clone() for _, site in iter_sites(model)}


def fold(model: Any) -> None:
    """Merge adapters and stages into plain weights, in place; frozen ones in bf16 become fp32, so that sums are exact.

    Raises:
        ConfigError: An adapter's output is added to a masked or quantised weight, so that no single
            weight of that kind computes the sum.
    """
    check_mergeable(model)
    for path, layer in list(branched_layers(model)):
        base = base_of(layer)
        _replace(model, path, _merged(path, layer, (base.fold() if isinstance(base, Site) else base).float()))
    fold_sites(model)
    forget_branches(model)
    model.float()


def _merged(path: str, layer: nn.Module, base: nn.Module) -> nn.Module:
    try:
        return merged(layer, base)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"{path}: this adapter is no weight that could be merged ({' '.join(str(error).split())}); export it with "
            f"`--to adapter`"
        ) from error


def check_mergeable(model: nn.Module) -> None:
    """Refuse a model that `fold` would; the weights may be on the meta device.

    Raises:
        ConfigError: See `fold`.
    """
    for path, layer in branched_layers(model):
        techniques = reshaping_stages(base_of(layer))
        if techniques:
            raise ConfigError(
                f"{path}: an output-branch adapter beside {' and '.join(techniques)} cannot be merged, the sum would "
                f"be neither; export it with `--to adapter`, which writes the folded base beside it"
            )


def detach_adapters(model: Any) -> None:
    """Take adapters off without merging them."""
    for path, layer in list(branched_layers(model)):
        _replace(model, path, base_of(layer))
    forget_branches(model)


def fold_sites(model: Any) -> None:
    """Fold what stands around modules and every site, in place, into the family's own layers; adapters stay.

    Raises:
        ConfigError: No plain model computes what something around a module does.
    """
    _fold_arounds(model)
    tied = _is_tied(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, ExpertSite):
            module.fold()
        elif isinstance(module, Site):
            _replace(model, path, module.fold())
    for module in list(model.modules()):
        sites = module._modules.get("sites")
        if isinstance(sites, nn.ModuleDict) and all(isinstance(site, ExpertSite) for site in sites.values()):
            del module._modules["sites"]
    if tied:
        _tie_again(model)
    as_stored(model)


@torch.no_grad()
def _fold_arounds(model: nn.Module) -> None:
    for module in list(model.modules()):
        for around in reversed(list(arounds(module))):
            around.fold(module)
        take_off(module)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _is_tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(table, "weight", ())


def _tie_again(model: Any) -> None:
    """Share one parameter where both folded to the same values, else store both."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, table.weight):
        head.weight = table.weight
    else:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
