"""Adapters of any of PEFT's methods, taken off a model and written as PEFT itself writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.branches import adapter_config, branch_tensors, branched_layers, copy_untracked, has_factors
from leanmill.core.names import clean_name
from leanmill.core.quiet import ignore_warning


@dataclass(frozen=True)
class Wrapped:
    """What stands beside the layers of a model."""

    config: Any
    """PEFT's configuration of it."""
    tensors: dict[str, Tensor]
    """Parameters and buffers by path in the wrapped model."""
    layers: dict[str, nn.Module]
    """The layers themselves by plain name."""


def take_wrapped(model: nn.Module) -> Wrapped | None:
    """Return what wraps layers of `model`; None where nothing does, or only factors, which any method may hold."""
    layers = {clean_name(path): layer for path, layer in branched_layers(model)}
    if all(has_factors(layer) for layer in layers.values()):
        return None
    tensors = {path: tensor.detach().clone() for path, tensor, _ in branch_tensors(model)}
    return Wrapped(adapter_config(model), tensors, layers)


@torch.no_grad()
def write_wrapped(folder: Path, base: Any, wrapped: Wrapped, base_name: str, revision: str | None) -> int:
    """Wrap `base`, in place, as PEFT does, give it the trained values, write its files, and return their elements."""
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    ignore_warning("The PEFT config's `base_model_name_or_path` was renamed", UserWarning)
    peft_model: Any = get_peft_model(base, wrapped.config, autocast_adapter_dtype=False)
    for path, tensor, _ in branch_tensors(base):
        tensor.copy_(wrapped.tensors[path])
    for path, layer in branched_layers(base):
        copy_untracked(wrapped.layers[clean_name(path)], layer)
    config = adapter_config(peft_model)
    config.base_model_name_or_path, config.revision, config.inference_mode = base_name, revision, True
    config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    save_file(
        {name: value.clone().contiguous() for name, value in state.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return sum(value.numel() for value in state.values())
