"""Fully sharded data parallelism on torch's FSDP2, 1-D and hybrid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from leanmill.core.errors import ConfigError
from leanmill.parallel.blocks import decoder_blocks
from leanmill.parallel.config import FsdpEngine as FsdpConfig
from leanmill.parallel.engine import Preparation
from leanmill.parallel.launch import Ranks, ensure_process_group
from leanmill.parallel.native import NativeEngine
from leanmill.parallel.single import freeze


class FsdpEngine(NativeEngine):
    """Shards every parameter along its first dim: one group a decoder block, one for the rest.

    - The order is shard on meta, materialise each rank's shares, then build the optimizer.
    - `bf16` gathers and computes in bf16 and keeps fp32 shares for the optimizer; gradients are
      reduced in `reduce_dtype` and added up in fp32.
    - Gradients are reduce-scattered in every micro-batch, so no rank ever holds more than its share
      and one block's full gradient; in a hybrid mesh the all-reduce between replicas waits for the
      last. With `reshard_after_forward: false`, full weights stay in memory anyway, and so do full
      gradients until the last micro-batch, which then is the only one that communicates them.

    Args:
        config: The recipe's engine section.
        ranks: Which process this is.
        precision: Compute precision.

    Raises:
        ConfigError: `shard_size` does not divide the ranks.
    """

    name = "fsdp"

    def __init__(self, config: FsdpConfig, *, ranks: Ranks, precision: Literal["fp32", "bf16"]) -> None:
        super().__init__(ranks=ranks, precision=precision)
        shard_size = check_shard_size(config.shard_size, ranks.world_size)
        ensure_process_group(ranks)
        self.config = config
        self.mesh = _make_mesh(self.device.type, ranks.world_size, shard_size)

    def prepare(self, module: nn.Module, preparation: Preparation) -> None:
        self._shard_blocks(module.model, self._offload_policy())  # type: ignore[arg-type]
        # The root's weights are used at the end of forward and at the start of backward: freeing
        # them in between would only gather them twice.
        fully_shard(module, reshard_after_forward=False, **self._options(self._offload_policy()))
        if self.config.cpu_offload and self.device.type != "cpu":
            _give_storage(module, torch.device("cpu"))
        preparation.materialise(module)
        _move_plain_tensors(module, self.device)
        self.module = module
        self._make_optimizer(preparation)

    def _shard_blocks(self, model: nn.Module, offload: OffloadPolicy) -> None:
        for block in decoder_blocks(model):
            fully_shard(block, reshard_after_forward=self.config.reshard_after_forward, **self._options(offload))

    def _options(self, offload: OffloadPolicy) -> dict[str, Any]:
        return {"mesh": self.mesh, "mp_policy": self._mixed_precision(), "offload_policy": offload}

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        reduce_bf16 = self.config.reduce_dtype == "bf16"
        if self.precision == "bf16":
            return MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16 if reduce_bf16 else torch.float32)
        return MixedPrecisionPolicy(None, torch.bfloat16 if reduce_bf16 else None)

    def _offload_policy(self) -> OffloadPolicy:
        if not self.config.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the mixed-precision policy casts at module boundaries instead

    @contextmanager
    def _micro_batch(self, *, is_last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        if not self.config.reshard_after_forward:
            self.module.set_requires_gradient_sync(is_last)
        elif self.mesh.ndim == 2:
            self.module.set_requires_all_reduce(is_last)
        yield

    def _settle(self) -> None:
        # Without a backward, groups that stay gathered after forward would leave their full
        # weights registered, which neither the optimizer nor a checkpoint knows.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Shard the blocks only: a loss may use the head's weight outside the model's forward.

        Embedding, final norm and head stay whole on every rank.
        """
        freeze(model, self.precision)
        for block in decoder_blocks(model):
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        _move_plain_tensors(model, self.device)
        return model


def check_shard_size(shard_size: int | None, world_size: int) -> int:
    """Return how many ranks a parameter is sharded over.

    Raises:
        ConfigError: It does not divide the number of ranks, or shards nothing.
    """
    if shard_size is None:
        return world_size
    if world_size % shard_size:
        divisors = [d for d in range(2, world_size + 1) if world_size % d == 0]
        raise ConfigError(
            f"engine.shard_size={shard_size} does not divide the {world_size} ranks; set one of {divisors or [1]}"
        )
    if shard_size == 1 and world_size > 1:
        raise ConfigError("engine.shard_size=1 shards nothing; type engine=ddp, or set engine.shard_size=2 or more")
    return shard_size


def _make_mesh(device_type: str, world_size: int, shard_size: int) -> DeviceMesh:
    if shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_size, shard_size)
    # Neighbouring ranks share parameters: they are the ones on one machine.
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


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


@torch.no_grad()
def _move_plain_tensors(module: nn.Module, device: torch.device) -> None:
    """Move what is not sharded; sharded parameters are where their policy wants them."""
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for key, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, DTensor):
                owner._buffers[key] = buffer.to(device)
