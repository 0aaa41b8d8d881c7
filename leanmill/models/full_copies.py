"""Tensors of a model on the meta device: storage for them, and full-size copies on the CPU to draw values in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leanmill.core.compact import CodedWeight


def own_tensor(module: nn.Module, key: str) -> Tensor | None:
    """Return the parameter or buffer `key` of `module`."""
    return module._parameters[key] if key in module._parameters else module._buffers[key]


def full_copy(
    top: nn.Module, members: list[nn.Module], coded: dict[tuple[int, str], CodedWeight]
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Copy `top` shallowly, giving `members` below it full-size tensors of their own on the CPU.

    New tensors start as NaN (floats) or zero, to show later what nobody initialised; plain tensors
    with a value start with it. In the place of codes is the weight that they are of.
    """
    copies = {id(module): _shallow(module) for module in members}
    for module in members:
        twin = copies[id(module)]
        own = {
            key: None if p is None else nn.Parameter(_blank(p, coded.get((id(module), key))), False)
            for key, p in module._parameters.items()
        }
        twin.__dict__["_parameters"] = own
        twin.__dict__["_buffers"] = {key: None if b is None else _blank(b) for key, b in module._buffers.items()}
        twin.__dict__["_modules"] = {
            key: None if child is None else copies.get(id(child), child) for key, child in module._modules.items()
        }
    return copies[id(top)], copies


def _shallow(module: nn.Module) -> nn.Module:
    """`copy.copy`, also of what FSDP2 has sharded: its classes build an unsharded module when asked for a new one."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def _blank(tensor: Tensor, compact: CodedWeight | None = None) -> Tensor:
    if compact is not None:
        return torch.full(compact.shape, float("nan"))
    if tensor.is_meta or isinstance(tensor, (DTensor, nn.Parameter)):
        fill = float("nan") if tensor.is_floating_point() else 0
        return torch.full(tensor.shape, fill, dtype=tensor.dtype, device="cpu")
    return tensor.detach().to("cpu", copy=True)


def with_storage(owner: nn.Module, key: str, root: nn.Module) -> Tensor:
    """Return the tensor `owner.key`, replaced by one with storage everywhere it occurs if on meta."""
    tensor = own_tensor(owner, key)
    assert tensor is not None
    if not tensor.is_meta:
        return tensor
    if isinstance(tensor, DTensor):
        new: Tensor = torch.empty_like(tensor, device=tensor.device_mesh.device_type)
    else:
        new = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
        for module in root.modules():  # tied parameters stay one object
            for name, parameter in module._parameters.items():
                if parameter is tensor:
                    module._parameters[name] = new  # type: ignore[assignment]
    else:
        owner._buffers[key] = new
    return new
