"""A model that has its weights, for a while without them: techniques are installed on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def without_storage(model: nn.Module) -> Iterator[None]:
    """Have all parameters and buffers of `model` on the meta device inside the context, and back after it.

    Modules may be replaced and parameters frozen meanwhile: each tensor goes back to wherever its stand-in is.
    """
    kept: dict[int, Tensor] = {}
    stand_ins: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    stand_in = stand_ins.setdefault(id(tensor), _stand_in(tensor))
                    kept[id(stand_in)] = tensor
                    tensors[key] = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if id(tensor) in kept:
                        assert tensor is not None
                        tensors[key] = kept[id(tensor)].requires_grad_(tensor.requires_grad)  # type: ignore[assignment]


def _stand_in(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
