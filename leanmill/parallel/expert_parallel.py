"""Spreading the experts of a model over ranks: each rank of an `ep` group gets some experts of every layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from leanmill.core.errors import ConfigError
from leanmill.core.expert_shards import ExpertShard, set_expert_shard
from leanmill.core.experts import is_stacked_experts, set_dispatch, stacked_parameters
from leanmill.core.names import clean_name
from leanmill.core.near import near_divisors
from leanmill.core.noise import Noise
from leanmill.parallel.dispatch import AllToAllDispatch
from leanmill.parallel.layout import Layout
from leanmill.parallel.shared_experts import overlap_shared_experts


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield (name, module, number of experts) of every layer's stacked experts."""
    for path, module in model.named_modules():
        if is_stacked_experts(module):
            yield clean_name(path), module, getattr(module, stacked_parameters(module)[0]).shape[0]


def num_held_parameters(model: nn.Module, ep: int, split: Collection[str] = (), tp: int = 1) -> int:
    """Return the parameters that a rank without sharding holds, tied ones once.

    The mean over ranks where they do not share evenly.

    Args:
        model: The causal LM.
        ep: Ranks that share its experts.
        split: Names of the parameters whose matmuls ranks share.
        tp: Ranks that share those.
    """
    shared = sum(p.numel() for _, module, _ in expert_modules(model) for p in module.parameters())
    split_numel = sum(p.numel() for name, p in model.named_parameters() if clean_name(name) in split)
    whole = sum(p.numel() for p in model.parameters()) - shared - split_numel
    return whole + shared // ep + split_numel // tp


def check_experts(model: nn.Module, ep: int, *, is_even: bool = True) -> None:
    """Refuse a model whose experts `ep` ranks cannot share; it may be on the meta device.

    Args:
        model: The causal LM.
        ep: Ranks that share its experts.
        is_even: Whether each must have as many.

    Raises:
        ConfigError: It has no experts, keeps them as separate modules, or a layer's do not divide.
    """
    if ep == 1:
        return
    found = list(expert_modules(model))
    if not found:
        lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and path.endswith("experts")]
        why = (
            f"{lists[0]} holds each expert as a module of its own, which transformers' experts interface does not reach"
            if lists
            else "this model has no experts"
        )
        if not is_even:
            raise ConfigError(f"layout.experts=fully_sharded shards experts over ranks, and {why}; remove it")
        raise ConfigError(f"layout.ep={ep} spreads experts over ranks, and {why}; set layout.ep=1")
    for name, _, num_experts in found:
        if is_even and num_experts % ep:
            near = near_divisors(ep, *(number for _, _, number in found))
            raise ConfigError(
                f"layout.ep={ep} does not divide the {num_experts} experts of {name}; set layout.ep={near}"
            )


def spread_experts(model: nn.Module, layout: Layout, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
    """Turn the experts' parameters on the meta device into DTensors, and let tokens travel to their experts.

    Args:
        model: The causal LM, with everything its techniques add.
        layout: With an `ep` above 1.
        mesh: Of the DTensors; its last dim is `ep`.
        placements: On that mesh; the last is a shard of dim 0.

    Raises:
        ConfigError: See `check_experts`; our compute does not cover the experts, or a stage shares a parameter
            among experts.
    """
    check_experts(model, layout.ep)
    group = layout.experts.get_group("ep")
    block_of = {id(child): block for block in model.modules() for child in block._modules.values()}
    for name, module, num_experts in list(expert_modules(model)):
        held = num_experts // layout.ep
        shard = ExpertShard(layout.experts.get_local_rank("ep") * held, held, layout.divisor("expert"))
        set_dispatch(module, AllToAllDispatch(group, num_experts, num_chunks=layout.expert_chunks), name)
        set_expert_shard(module, shard)
        overlap_shared_experts(block_of[id(module)], module)
        for path, owner in module.named_modules():
            if ".inputs" in path:
                continue  # activations: what of those is learned is shared by all experts
            if isinstance(owner, Noise):
                owner.first_row = shard.first
            _spread_tensors(f"{name}.{path}" if path else name, owner, num_experts, mesh, placements)


def _spread_tensors(
    name: str, owner: nn.Module, num_experts: int, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> None:
    for key, parameter in owner._parameters.items():
        if parameter is None:
            continue
        if parameter.dim() == 0 or parameter.shape[0] != num_experts:
            raise ConfigError(
                f"{name}.{key} {list(parameter.shape)} is one for all {num_experts} experts, and layout.ep spreads "
                f"them over ranks; set layout.ep=1, or add {name.partition('.sites')[0]!r} to the technique's exclude"
            )
        spread = nn.Parameter(_as_dtensor(parameter.detach(), mesh, placements), parameter.requires_grad)
        owner._parameters[key] = spread
    for key, buffer in owner._buffers.items():
        if buffer is not None and buffer.dim() > 0 and buffer.shape[0] == num_experts:
            owner._buffers[key] = _as_dtensor(buffer, mesh, placements)


def _as_dtensor(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    held = whole.shape[0] // mesh.size(mesh.ndim - 1)
    part = whole.narrow(0, mesh.get_local_rank(mesh.ndim - 1) * held, held)
    part = torch.empty_like(part) if part.is_meta else part.clone()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def replicated_experts(layout: Layout) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """Return mesh and placements of experts that are spread over `ep` and replicated over the other ranks."""
    mesh = layout.experts["replicate", "ep"]
    return mesh, (Replicate(), Shard(0))


def is_spread(tensor: Any) -> bool:
    """Whether a tensor of an unsharded model is one of experts that ranks share."""
    return isinstance(tensor, DTensor)
