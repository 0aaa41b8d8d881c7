"""Fully sharded data parallelism on torch's FSDP2, 1-D and hybrid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from leanmill.core.blocks import added_blocks, decoder_blocks, shared_between
from leanmill.core.branches import parameters_beside_buffers
from leanmill.core.errors import ConfigError
from leanmill.core.site import EmbeddingSite
from leanmill.core.sites import iter_sites, staged_parameters
from leanmill.core.staging import StagedOnce
from leanmill.parallel.config import FsdpEngine as FsdpConfig
from leanmill.parallel.config import LayoutConfig
from leanmill.parallel.engine import Preparation
from leanmill.parallel.expert_parallel import spread_experts
from leanmill.parallel.expert_sharding import ExpertSharding
from leanmill.parallel.frozen import move_plain_tensors, shard_frozen
from leanmill.parallel.fssdp import OwnedExperts
from leanmill.parallel.launch import Ranks, ensure_process_group
from leanmill.parallel.layout import Layout, resolve_layout
from leanmill.parallel.pipeline_parts import Absent
from leanmill.parallel.single import freeze
from leanmill.parallel.staging_shards import ShardStaging
from leanmill.parallel.torch_engine import TorchEngine


class FsdpEngine(TorchEngine):
    """Shards every parameter along its first dim: one group a decoder block, one for the rest.

    - The order is shard on meta, materialise each rank's shares, then build the optimizer.
    - `bf16` gathers and computes in bf16 and keeps fp32 shares for the optimizer; gradients are
      reduced in `reduce_dtype` and added up in fp32.
    - Masks and scales come from the values that the optimizer writes and an export reads, not from
      their rounding. Most weights are staged once a step on their shards (`ShardStaging`), and gathered
      as they are multiplied with. Those that are staged at use are gathered in fp32; before PyTorch
      2.12, whose groups share one policy, a model with such weights gathers all in fp32 and computes
      under autocast.
    - Gradients are reduce-scattered in every micro-batch, so no rank ever holds more than its share
      and one block's full gradient; in a hybrid mesh the all-reduce between replicas waits for the
      last. With `reshard_after_forward: false`, full weights stay in memory anyway, and so do full
      gradients until the last micro-batch, which then is the only one that communicates them.
    - Experts that a layout spreads over ranks are sharded among the ranks that hold the same ones.

    Args:
        config: The recipe's engine section.
        ranks: Which process this is.
        precision: Compute precision.
        layout: Of the run; None shards as `config` says.

    Raises:
        ConfigError: `shard_size` does not divide the ranks.
    """

    name = "fsdp"

    def __init__(
        self,
        config: FsdpConfig,
        *,
        ranks: Ranks,
        precision: Literal["fp32", "bf16"],
        layout: Layout | None = None,
    ) -> None:
        ensure_process_group(ranks)
        layout = layout or resolve_layout(LayoutConfig(), config, ranks.world_size, ranks.device.type)
        super().__init__(ranks=ranks, precision=precision, layout=layout)
        self.config = config
        self.mesh = self.layout.dense
        self._experts: ExpertSharding | None = None
        self.autocasts = False
        """Whether everything is gathered in fp32 and autocast gives bf16."""
        self._root: nn.Module | None = None
        self._shared: list[nn.Parameter] = []

    def prepare(self, module: nn.Module, preparation: Preparation) -> None:
        self._cut(module, preparation)
        if self.layout.fully_sharded is not None:
            self._owned = OwnedExperts(module.model, self.layout)  # type: ignore[arg-type]
        elif self.layout.ep > 1:
            self._experts = self._spread_experts(module.model)  # type: ignore[arg-type]
        self._split_matmuls(module, replicated=False)
        self._rows.prepare(module.model)  # type: ignore[arg-type]
        group = self.mesh.get_group("shard")
        against = {} if self._experts is None else {"reason_against": self._experts.reason_against}
        weights = self._staged_once(module, self.config.staging, num_shards=group.size(), **against)
        if self.config.gather == "packed" and not any(weight.packing for weight in weights):
            raise ConfigError(
                "engine.gather=packed, but no weight here is staged once a step into a form that packs (ternary and "
                "nm_sparsity have one); set engine.gather=full"
            )
        staged_at_use = _staged_at_use(module, weights)
        self.autocasts = self.precision == "bf16" and bool(staged_at_use) and not has_groups_of_their_own()
        self.staging = staging = ShardStaging(
            weights,
            group,
            dtype=torch.bfloat16 if self._gathers_bf16 else None,
            packs=self.config.gather == "packed",
            device=self.device,
        )
        model: nn.Module = module.model  # type: ignore[assignment]
        blocks = [*decoder_blocks(model), *added_blocks(model)]
        if self._pipeline is not None:
            blocks = [block for block in blocks if not isinstance(block, Absent)]
            self._pipeline.boundary_dtype = torch.bfloat16 if self._gathers_bf16 else None
        self._root, self._shared = module, _lift_shared(module, blocks)
        for block in blocks:
            self._shard(block, reshard_after_forward=self.config.reshard_after_forward)
        # The root's weights are used at the end of forward and at the start of backward: freeing
        # them in between would only gather them twice.
        self._shard(module, reshard_after_forward=False)
        staging.adopt(module)
        if self._gathers_bf16:
            _return_bf16(module)
        if self.config.cpu_offload and self.device.type != "cpu":
            _give_storage(module, torch.device("cpu"))
        preparation.materialise(module)
        move_plain_tensors(module, self.device)
        self.module = module
        self._make_optimizer(preparation)

    def _spread_experts(self, model: nn.Module) -> ExpertSharding:
        if not has_groups_of_their_own():
            raise ConfigError(
                f"layout.ep={self.layout.ep} under engine=fsdp needs PyTorch 2.12 or newer, where the parameters of a "
                f"block may be sharded over several meshes; upgrade, or type engine=ddp"
            )
        spread_experts(model, self.layout, self.layout.experts["ep"], (Shard(0),))
        return ExpertSharding(self.layout)

    def _shard(self, module: nn.Module, *, reshard_after_forward: bool) -> None:
        fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=self._mixed_precision("bf16" if self._gathers_bf16 else "fp32"),
            offload_policy=self._offload_policy(),
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=None if self._experts is None else self._experts.placement,
            ignored_params=self._ignored(module),
        )
        if self._gathers_bf16:
            _split_off_staged(module, self.staging.weights, self._mixed_precision("fp32"))

    def _ignored(self, module: nn.Module) -> set[nn.Parameter] | None:
        """Parameters below `module` that its group leaves to others."""
        of_root = () if module is self._root else self._shared
        owned = () if self._owned is None else self._owned.parameters()
        return {*of_root, *owned} or None

    @property
    def _gathers_bf16(self) -> bool:
        return self.precision == "bf16" and not self.autocasts

    def _mixed_precision(self, precision: Literal["fp32", "bf16"]) -> MixedPrecisionPolicy:
        reduce_bf16 = self.config.reduce_dtype == "bf16"
        if precision == "bf16":
            return MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16 if reduce_bf16 else torch.float32)
        return MixedPrecisionPolicy(None, torch.bfloat16 if reduce_bf16 else None)

    def _offload_policy(self) -> OffloadPolicy:
        if not self.config.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocasts:
            # Casts that it keeps until the forward ends would be the whole model, gathered, in bf16.
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return nullcontext()  # the mixed-precision policy casts at module boundaries instead

    @contextmanager
    def _micro_batch(self, *, is_last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        if not self.config.reshard_after_forward:
            self.module.set_requires_gradient_sync(is_last)
        elif self.mesh.ndim == 2 or (self._experts is not None and self._experts.has_replicas):
            self.module.set_requires_all_reduce(is_last)
        yield

    def _settle(self) -> None:
        # Without a backward, groups that stay gathered after forward would leave their full
        # weights registered, which neither the optimizer nor a checkpoint knows.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _trainable_changed(self) -> None:
        # A group derives the dtype of its reductions from what trains, once: a group all of whose parameters
        # rested at the first forward would reduce in whatever dtype gradients come.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                for group in param_groups(part):
                    group._init_mp_dtypes()

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return shard_frozen(freeze(model, self.precision), self.mesh, self.device)


def _lift_shared(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Let the root's group hold what several blocks share, and return it: a parameter has one group.

    FSDP2 looks for a group's parameters outside of the modules that have groups of their own.
    """
    shared = shared_between(blocks)
    if shared:
        module.add_module("shared_between_blocks", nn.ModuleList(shared))
    return [parameter for one in shared for parameter in one._parameters.values() if parameter is not None]


def _staged_at_use(module: nn.Module, once: Sequence[StagedOnce]) -> set[int]:
    """Ids of the parameters that are gathered in fp32.

    Those that stages read in forward, all staged ones but those of `once`, and those that adapters multiply with
    buffers, which keep their fp32.
    """
    elsewhere = {id(p) for weight in once for p in (weight.raw, *weight.own)}
    read = {id(parameter) for parameter in staged_parameters(module)} - elsewhere
    return read | {id(parameter) for parameter in parameters_beside_buffers(module)}


def _split_off_staged(module: nn.Module, once: Sequence[StagedOnce], policy: MixedPrecisionPolicy) -> None:
    """Gather what the weights that `module`'s own group stages at use are computed from by a second group.

    Both groups hang on the module's own hooks, so a compiled block stays whole and activation
    checkpointing recomputes inside of them. FSDP2 knows several groups a module (for parameters on
    different meshes), but no public way to give them different policies.

    Args:
        module: What `fully_shard` was just called on.
        once: Weights that are staged before they are gathered.
        policy: Of the second group.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    staged = _staged_at_use(module, once)
    if not staged:
        return
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    groups = []
    for first in state._fsdp_param_groups:
        where = (first.modules, first.mesh_info, first.post_forward_mesh_info, first.device)
        second = FSDPParamGroup([], *where, None, policy, first.offload_policy)
        second.fsdp_params = [p for p in first.fsdp_params if id(p.sharded_param) in staged]
        first.fsdp_params = [p for p in first.fsdp_params if id(p.sharded_param) not in staged]
        groups += [group for group in (first, second) if group.fsdp_params]
    state._fsdp_param_groups = groups


def param_groups(module: FSDPModule) -> list[Any]:
    """Return the groups that gather `module`'s own parameters."""
    state: Any = module._get_fsdp_state()
    if has_groups_of_their_own():
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def has_groups_of_their_own() -> bool:
    """Whether this PyTorch lets the parameters of one module be gathered by several groups (2.12 and newer)."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    return hasattr(FSDPState(), "_fsdp_param_groups")


def _return_bf16(module: nn.Module) -> None:
    """Let staged embeddings return what a table gathered in bf16 would; linear layers take their input's dtype."""
    for _, site in iter_sites(module):
        if isinstance(site, EmbeddingSite) and site.stages:
            site.register_forward_hook(lambda _module, _input, output: output.to(torch.bfloat16))


def _give_storage(module: nn.Module, device: torch.device) -> None:
    """Give parameters on meta storage on `device`; tied ones stay one object."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                storage = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(storage, parameter.requires_grad)
            owner._parameters[key] = made[id(parameter)]
