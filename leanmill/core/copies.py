"""Copies of modules with other tensors, free of what an engine hung on them."""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import Tensor, nn


def cpu_copy(module: nn.Module, parameters: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """Copy a module with `parameters` in place of its own, buffers on the CPU and no hooks.

    Hooks are left out because engines hang collectives on them; `copy.deepcopy` would copy shards
    and hooks alike.

    Args:
        module: Any module.
        parameters: Full tensors by their name below `module`.
        prefix: Of the names, for the recursion.
    """
    clone = copy.copy(module)
    for key, value in vars(clone).items():
        if key.endswith("_hooks") or "_hooks_" in key:
            clone.__dict__[key] = OrderedDict() if isinstance(value, dict) else value
    own = module._parameters
    clone._parameters = {
        name: None if p is None else nn.Parameter(parameters[prefix + name], requires_grad=False)
        for name, p in own.items()
    }
    clone._buffers = {name: None if b is None else b.detach().cpu() for name, b in module._buffers.items()}
    clone._modules = {
        name: None if child is None else cpu_copy(child, parameters, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return clone
