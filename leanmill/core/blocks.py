"""Finding the repeated layers of a causal LM, the unit of sharding, recompute and compilation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from leanmill.core.stage import TechniqueModule


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of `model`, in order.

    They are the children of the largest `nn.ModuleList` (by parameters) that lies in no other one,
    which is what every Hugging Face causal LM calls `layers`, `h` or `blocks`.

    Args:
        model: A causal LM, or any module that holds one.
    """
    best: list[nn.Module] = []
    most = 0
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        inside.update(id(child) for child in module.modules() if child is not module)
        size = sum(p.numel() for p in module.parameters())
        if size > most:
            best, most = list(module), size
    return best


def added_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the decoder blocks that techniques added to `model`."""
    for module in model.modules():
        if isinstance(module, TechniqueModule):
            yield from module.blocks()


def shared_between(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules with parameters of their own that several of `blocks` hold, such as a pool that adapters draw from."""
    holders: dict[int, int] = {}
    found: dict[int, nn.Module] = {}
    for block in blocks:
        for module in block.modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                holders[id(module)] = holders.get(id(module), 0) + 1
                found[id(module)] = module
    return [module for key, module in found.items() if holders[key] > 1]
