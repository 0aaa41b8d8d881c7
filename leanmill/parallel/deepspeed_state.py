"""Reading and writing what ZeRO has cut up, one whole parameter at a time.

DeepSpeed keeps flat partitions cut at any element; everything outside this file sees parameters by
name. A gathered value is handed out as a DTensor on a CPU mesh, each rank keeping its rows, so
that a checkpoint looks like any sharded engine's and loads at another rank count.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from leanmill.core.errors import RunError
from leanmill.parallel.optimizer_state import allocate_state
from leanmill.parallel.tensors import full


def cpu_mesh(shape: tuple[int, ...] = (-1,)) -> DeviceMesh:
    """Return a mesh over all ranks whose collectives run on CPU tensors; one size may be -1."""
    if "gloo" in dist.get_backend_config():
        return init_device_mesh("cpu", torch.empty(dist.get_world_size(), device="meta").view(shape).shape)
    if len(shape) > 1:
        raise RunError("expert parallelism under DeepSpeed needs gloo beside NCCL; start with `leanmill train`")
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return DeviceMesh.from_group(group, "cpu")


def empty_share(like: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return CPU storage for this rank's rows of a tensor like `like`, as a DTensor."""
    rows = _rows(like.shape, mesh)
    local = torch.empty((rows.stop - rows.start, *like.shape[1:]), dtype=like.dtype)
    return _as_dtensor(local, like, mesh)


def share(full: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's rows of `full` as a DTensor; tensors without rows, or on one rank, stay whole."""
    if mesh.size() == 1 or full.dim() == 0:
        return full.detach().to("cpu", copy=True)
    local = full.detach()[_rows(full.shape, mesh)].to("cpu", copy=True, memory_format=torch.contiguous_format)
    return _as_dtensor(local, full, mesh)


def _rows(shape: torch.Size, mesh: DeviceMesh) -> slice:
    each = -(-shape[0] // mesh.size())
    first = min(each * mesh.get_local_rank(), shape[0])
    return slice(first, min(first + each, shape[0]))


def _as_dtensor(local: Tensor, full: Tensor, mesh: DeviceMesh) -> Tensor:
    stride = torch.empty(full.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=stride)


@torch.no_grad()
def whole_parameter(parameter: Any) -> Tensor:
    """Return a parameter whole on every rank, whoever sharded it; DeepSpeed's fp32 master if there. A collective."""
    # A rank that holds nothing of it has None there, and takes part all the same.
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return full(parameter.detach())
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach()  # type: ignore[no-any-return]
    with zero.GatheredParameters(parameter):
        return parameter.detach().clone()  # type: ignore[no-any-return]


class ZeroState:
    """Whole values out of DeepSpeed's optimizer wrapper and back.

    Args:
        optimizer: DeepSpeed's wrapper (stages 1 to 3) or the plain optimizer (stage 0).
        stage: ZeRO stage.
    """

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.optimizer, self.stage = optimizer, stage
        self.has_gradients = False
        """Whether a backward is complete and no step has used it up."""
        self.written_gradients: dict[int, Tensor] = {}
        """By DeepSpeed's id of a parameter: pieces of gradients that were handed out to be written."""

    @property
    def base(self) -> torch.optim.Optimizer:
        """The recipe's optimizer, which steps flat partitions in stages 1 to 3."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer  # type: ignore[no-any-return]

    @torch.no_grad()
    def parameter(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole parameter, the fp32 master where it is trained, on every rank."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0 or (self.stage < 3 and not parameter.requires_grad):
            return parameter.detach()
        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)  # type: ignore[no-any-return]
        with zero.GatheredParameters(parameter):
            return parameter.detach().clone()

    @torch.no_grad()
    def set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write the whole `value` into the parameter, its partitions and its master."""
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage < 3:
            parameter.copy_(value)
            if self.stage > 0 and parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.float())
            return
        with zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.copy_(value)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, self._partition(parameter, value.float()))

    @torch.no_grad()
    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole gradient, reduced over ranks; zero where nothing reached the parameter."""
        from deepspeed.utils import safe_get_full_grad

        if self.stage == 0:
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return safe_get_full_grad(parameter)  # type: ignore[no-any-return]

    def state_keys(self, parameter: nn.Parameter) -> tuple[list[str], list[str]]:
        """Names of the element-wise state of a parameter, and of its counters."""
        owner = self._owner(parameter)
        state = self.base.state[owner]
        element_wise = [k for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 0]
        return element_wise, [k for k in state if k not in element_wise]

    @torch.no_grad()
    def state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return one whole element-wise state tensor, on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return self.base.state[parameter][key]  # type: ignore[no-any-return]
        return safe_get_full_optimizer_state(parameter, key)  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Write one whole element-wise state tensor."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.base.state[parameter][key].copy_(value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_local_optimizer_state(parameter, self._partition(parameter, value), key)

    def counter(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return a counter such as `step`, which a partition's parameters share."""
        value = self.base.state[self._owner(parameter)][key]
        return torch.as_tensor(value, dtype=torch.float32, device="cpu").clone()

    def set_counter(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Write a counter, keeping its kind (tensor or number)."""
        state = self.base.state[self._owner(parameter)]
        old = state[key]
        state[key] = old.copy_(value) if isinstance(old, Tensor) else type(old)(value.item())

    @torch.no_grad()
    def allocate(self) -> None:
        """Give every trained parameter zero-filled optimizer state where it has none yet.

        For saving before the first step, and for loading into.

        Raises:
            RunError: The optimizer's partitions lie on NVMe, where a first step must make the state.
        """
        if self.stage == 3 and self.optimizer.swap_optimizer:
            # A partition that is swapped out is an empty tensor; state made from it would be empty too.
            flats = self.optimizer.fp32_partitioned_groups_flat
            if any(flat.numel() == 0 and not self.base.state.get(flat) for flat in flats):
                raise RunError(
                    "optimizer state on NVMe can be neither saved nor loaded before its first step; "
                    "resume with engine.offload_optimizer.device=cpu, the checkpoint fits both"
                )
        if self.stage == 3:
            # Between steps DeepSpeed keeps the groups of the recipe's optimizer empty.
            self.optimizer._set_fp32_optimizer_param_groups()
        allocate_state(self.base)
        if self.stage == 3:
            self.optimizer._clear_fp32_optimizer_param_groups()
        elif self.stage > 0:
            # DeepSpeed links parameters to their state once, after its step of the first group only.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def forget_gradients(self) -> None:
        """Hand out no more pieces of gradients: the step uses them up."""
        self.has_gradients = False
        self.written_gradients = {}

    def drop_gradients(self) -> None:
        """Forget this step's gradients, the way DeepSpeed does after an fp16 overflow."""
        optimizer = self.optimizer
        if self.stage == 3:
            optimizer._pre_step()
            optimizer._partition_all_parameters()
            optimizer._overflow_clean_up(1.0)
            return
        optimizer.zero_grad(set_to_none=True)
        if self.stage == 0:
            return
        optimizer.micro_step_id = -1
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
            return
        for index in optimizer.averaged_gradients:
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None

    @torch.no_grad()
    def global_norm(self) -> Any:
        """Return the gradient norm over all ranks (stages 1 to 3), as `step` will compute it again."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        noted = getattr(self.optimizer, "norm_for_param_grads", {})
        for index, gradient in self.written_gradients.items():
            # With optimizer offload, norms were taken as the gradients arrived.
            if index in noted:
                noted[index] = gradient.double().norm()
        if self.stage == 3:
            return combine_grad_norm_groups(self.optimizer._get_norm_groups())
        return self.optimizer.scaled_global_norm()

    def _owner(self, parameter: nn.Parameter) -> Tensor:
        if self.stage == 0:
            return parameter
        if self.stage == 3:
            index = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)][0]
            return self.optimizer.fp32_partitioned_groups_flat[index]  # type: ignore[no-any-return]
        for index, group in enumerate(self.optimizer.bit16_groups):
            if any(parameter is member for member in group):
                return self.optimizer.single_partition_of_fp32_groups[index]  # type: ignore[no-any-return]
        raise AssertionError("a trained parameter belongs to a group")

    @staticmethod
    def _partition(parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's flat part of `value`, padded to the size all ranks have."""
        size, rank = parameter.ds_tensor.ds_numel, partition_rank(parameter)  # type: ignore[attr-defined]
        flat = value.detach().reshape(-1)
        part = flat[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))


def partition_rank(parameter: nn.Parameter) -> int:
    """Return which of its partitions of stage 3 is here; experts have groups of their own."""
    return getattr(parameter, "ds_zero_partition_rank", dist.get_rank())
