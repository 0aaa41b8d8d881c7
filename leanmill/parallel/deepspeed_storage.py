"""Storage for a module on meta, as each ZeRO stage wants it before `deepspeed.initialize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from leanmill.core.experts import is_stacked_experts
from leanmill.parallel.deepspeed_state import empty_share
from leanmill.parallel.tensors import full


def give_storage(module: nn.Module, mesh: DeviceMesh, device: torch.device, *, stage: int) -> None:
    """Replace meta parameters by ones with storage, tied ones staying one object.

    Stages 0 to 2 keep the whole model on the device. Stage 3 fills rows of a DTensor on the
    CPU first, so that no rank ever holds more than its share and one whole parameter.

    Args:
        module: The train module.
        mesh: All ranks, on the CPU.
        device: This rank's.
        stage: Of ZeRO.
    """
    new: dict[int, nn.Parameter] = {}
    for owner, key, tensor in own_tensors(module, "_parameters"):
        if not tensor.is_meta:
            continue
        if id(tensor) not in new:
            is_shared = isinstance(tensor, DTensor)  # experts, of which this rank has its own
            sharded = stage == 3 and mesh.size() > 1 and tensor.dim() > 0 and not is_shared
            place = "cpu" if stage == 3 else device
            value = empty_share(tensor, mesh) if sharded else torch.empty_like(tensor, device=place)
            new[id(tensor)] = nn.Parameter(value, tensor.requires_grad)
        owner._parameters[key] = new[id(tensor)]


def partition(
    module: nn.Module,
    device: torch.device,
    ds_config: dict[str, Any],
    *,
    before: Callable[[Tensor, nn.Parameter], object],
) -> dict[int, nn.Parameter]:
    """Turn every parameter into a ZeRO-3 one, whole for a moment each; return old id -> new.

    Args:
        module: Its parameters have values.
        device: This rank's.
        ds_config: DeepSpeed's.
        before: Called with an old parameter and the new one in its place, before that is partitioned.
    """
    from deepspeed import zero

    done: dict[int, nn.Parameter] = {}
    kept: list[Tensor] = []  # ids stay unique only as long as the old ones live
    for owner, key, tensor in own_tensors(module, "_parameters"):
        if id(tensor) not in done:
            kept.append(tensor)
            new = nn.Parameter(full(tensor.detach()).to(device), tensor.requires_grad)
            before(tensor, new)
            if done:
                # One set of groups and, with NVMe, one set of buffers for all parameters.
                next(iter(done.values())).convert_to_zero_parameters(param_list=[new])  # type: ignore[attr-defined]
            else:
                zero.Init(module=nn.ParameterList([new]), config_dict_or_path=ds_config)
            done[id(tensor)] = new
        owner._parameters[key] = done[id(tensor)]
    return done


def own_tensors(module: nn.Module, kind: Literal["_parameters", "_buffers"]) -> Iterator[tuple[nn.Module, str, Any]]:
    """List (owner, key, tensor), shared tensors once an owner, in an order equal on all ranks."""
    owners = list(module.modules())
    return iter([(o, k, t) for o in owners for k, t in getattr(o, kind).items() if t is not None])


def mark_experts(module: nn.Module) -> None:
    """Let ZeRO-3 gather a layer's experts as one, whatever each rank's tokens are routed to."""
    from deepspeed.utils import set_z3_leaf_modules_by_name

    names = [name for name, child in module.named_modules() if is_stacked_experts(child)]
    if names:
        set_z3_leaf_modules_by_name(module, names)
