"""Experts that ranks share, as DeepSpeed takes them: plain tensors with this rank's part, averaged in their own groups.

DeepSpeed reduces a parameter with `allreduce = False` over the expert data parallel group of its `group_name`,
cuts it up among those ranks, and divides the sum by the number of all ranks. Stage 3 does so with parameters of
the family "autoep_expert", in the group that they name when they are partitioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leanmill.core.errors import ConfigError
from leanmill.core.expert_shards import expert_shard_of, set_expert_shard
from leanmill.parallel.deepspeed_state import cpu_mesh
from leanmill.parallel.expert_parallel import expert_modules, replicated_experts, spread_experts
from leanmill.parallel.layout import Layout
from leanmill.parallel.tensors import assign
from leanmill.parallel.tensors import local as local_part


class LocalExperts:
    """Knows which plain tensors are parts, and of what. Empty without expert parallelism.

    Args:
        layout: Of the run.
        stage: Of ZeRO.

    Raises:
        ConfigError: This DeepSpeed has no groups for parameters of stage 3.
    """

    def __init__(self, layout: Layout, stage: int) -> None:
        if layout.ep > 1 and stage == 3:
            _check_has_groups(layout.ep)
        self.layout = layout
        self._wholes: dict[int, torch.Size] = {}
        self._staged: set[int] = set()
        self._kept: dict[int, Tensor] = {}  # ids stay unique only as long as what they name lives
        if layout.ep > 1:
            self._mesh, self._placements = replicated_experts(layout)
            self._cpu_mesh = self._mesh if layout.device_type == "cpu" else cpu_mesh((-1, layout.ep))

    def spread(self, model: nn.Module) -> None:
        """Turn experts into DTensors on the meta device, to be filled as such."""
        if self.layout.ep == 1:
            return
        spread_experts(model, self.layout, self._mesh, self._placements)
        for _, module, _ in expert_modules(model):
            shard = expert_shard_of(module)
            assert shard is not None
            if "sites" not in module._modules:
                # DeepSpeed's division by all ranks is the whole of it.
                set_expert_shard(module, replace(shard, gradient_divisor=1))

    def localise(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replace the DTensors by this rank's parts, also in the optimizer, which has made groups of them alone."""
        if self.layout.ep == 1:
            return
        new: dict[int, nn.Parameter] = {}
        for _, module, _ in expert_modules(model):
            is_staged = "sites" in module._modules
            for owner in module.modules():
                for key, parameter in owner._parameters.items():
                    if isinstance(parameter, DTensor):
                        local = nn.Parameter(local_part(parameter.detach()), parameter.requires_grad)
                        new[id(parameter)] = owner._parameters[key] = local
                        self._declare(local, parameter.shape, is_staged)
                for key, buffer in owner._buffers.items():
                    if isinstance(buffer, DTensor):
                        owner._buffers[key] = self._note(local_part(buffer), buffer.shape)
        for group in optimizer.param_groups:
            if any(id(p) in new for p in group["params"]):
                group["params"] = [new[id(p)] for p in group["params"]]
                group |= {"moe": True, "name": self._group_name}
        _register_groups(self._group_name, self.layout)

    @property
    def _group_name(self) -> str:
        return f"ep_size_{self.layout.ep}"

    def _declare(self, local: Any, whole: torch.Size, is_staged: bool) -> None:
        local.allreduce, local.group_name = False, self._group_name
        if is_staged and local.requires_grad:
            # The product's share has been divided by `ep` already; a stage's own has not.
            local.register_hook(lambda gradient: gradient * self.layout.divisor("expert"))
            self._staged.add(id(local))
        self._note(local, whole)

    def replace(self, old: Tensor, new: Any) -> None:
        """Let `new`, which ZeRO-3 is about to partition, be the part that `old` was; nothing for other tensors."""
        if not self.is_part(old):
            return
        is_staged = id(old) in self._staged
        self._staged.discard(id(old))
        del self._kept[id(old)]  # a whole part, which nobody is to hold any more
        self._declare(new, self._wholes.pop(id(old)), is_staged)
        new.ds_zero_placement_family = "autoep_expert"
        new.ds_zero_partition_group_name = self._group_name
        new.ds_zero_partition_process_group = self.replicas

    def _note(self, local: Tensor, whole: torch.Size) -> Tensor:
        self._wholes[id(local)] = whole
        self._kept[id(local)] = local
        return local

    def shape(self, tensor: Tensor) -> torch.Size:
        """Return the shape of the whole that `tensor` is a part of, or its own."""
        return self._wholes.get(id(tensor), _shape(tensor))

    def offset(self, tensor: Tensor) -> int:
        """Return where the first element of `tensor` stands in the flattened whole."""
        return _shape(tensor).numel() * self.layout.experts.get_local_rank("ep") if self.is_part(tensor) else 0

    def is_part(self, tensor: Tensor) -> bool:
        """Whether other ranks hold other experts of what `tensor` is a part of."""
        return id(tensor) in self._wholes

    def total_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm over the gradients of whole parameters, reduced already, fp32. A collective."""
        parts = [p.grad for p in parameters if p.grad is not None and self.is_part(p)]
        others = [p.grad for p in parameters if p.grad is not None and not self.is_part(p)]
        norm = nn.utils.get_total_norm(others).float()
        if not parts:
            return norm
        squared = nn.utils.get_total_norm(parts).float().square()
        dist.all_reduce(squared, group=self.sharers)
        return (norm.square() + squared).sqrt()

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The ranks with the same experts."""
        return self._mesh.get_group("replicate")

    @property
    def sharers(self) -> dist.ProcessGroup:
        """The ranks that share experts."""
        return self._mesh.get_group("ep")

    def hand_out(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Return `value`, shaped like the part `tensor`, as a DTensor on the CPU; as it is where that is no part."""
        if not self.is_part(tensor):
            return value
        local = value.detach().to("cpu", copy=True)
        shape = self._wholes[id(tensor)]
        stride = torch.empty(shape, device="meta").stride()
        where = self._cpu_mesh, self._placements
        return DTensor.from_local(local, *where, run_check=False, shape=shape, stride=stride)

    def whole(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Return the whole that `value`, shaped like `tensor`, is a part of. A collective."""
        handed_out = self.hand_out(tensor, value)
        return handed_out.full_tensor().to(value.device) if isinstance(handed_out, DTensor) else handed_out

    def part(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Return what of a whole `value`, plain or sharded, belongs into `tensor`. A collective where it is sharded."""
        if not self.is_part(tensor):
            return value.full_tensor() if isinstance(value, DTensor) else value
        target = self.hand_out(tensor, torch.empty(_shape(tensor), dtype=value.dtype))
        assign(target, value)
        return target.to_local()  # type: ignore[attr-defined, no-any-return]


def _shape(tensor: Tensor) -> torch.Size:
    """Also of what ZeRO-3 has partitioned, which is left as an empty tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)


def _check_has_groups(ep: int) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if not hasattr(DeepSpeedZeroOptimizer_Stage3, "_gradient_averaging_world_size"):
        raise ConfigError(
            f"layout.ep={ep} under engine.stage=3 needs DeepSpeed 0.19.8 or newer, where parameters have groups of "
            f"their own; upgrade, or set engine.stage=2, or type engine=fsdp"
        )


def _register_groups(name: str, layout: Layout) -> None:
    """Tell DeepSpeed which ranks share experts, and which hold the same; its own table would outlive a run's groups."""
    from deepspeed.utils import groups

    mesh = layout.experts["replicate", "ep"]
    for dim, kind in (("ep", "EXPERT_PARALLEL"), ("replicate", "EXPERT_DATA_PARALLEL")):
        getattr(groups, f"_{kind}_GROUP")[name] = mesh.get_group(dim)
        row = mesh.mesh.movedim(mesh.mesh_dim_names.index(dim), -1)  # type: ignore[union-attr]
        mine = row[mesh.get_local_rank("ep" if dim == "replicate" else "replicate")]
        getattr(groups, f"_{kind}_GROUP_RANKS")[name] = mine.tolist()


def marker(num_experts: int) -> nn.Module:
    """Return an empty module that DeepSpeed takes for a layer of experts, which switches its groups of them on."""
    from deepspeed.moe.layer import MoE

    class Marker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """Groups are there."""

    return Marker()
