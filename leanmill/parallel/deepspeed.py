"""DeepSpeed ZeRO behind the engine protocol; `deepspeed.initialize` is called here and nowhere else.

Written against DeepSpeed 0.19: next to its public `safe_get_full_*` functions it uses a few of the
optimizer wrappers' own methods, all of them in `deepspeed_state`.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.views import Views
from leanmill.parallel import config as configs
from leanmill.parallel import deepspeed_storage as storage
from leanmill.parallel.collectives import set_data_group
from leanmill.parallel.deepspeed_config import PERSIST_BELOW, check_config, check_optimizer, derive_config
from leanmill.parallel.deepspeed_experts import LocalExperts, marker
from leanmill.parallel.deepspeed_gathers import gather_unseen
from leanmill.parallel.deepspeed_start import start_deepspeed
from leanmill.parallel.deepspeed_state import ZeroState, cpu_mesh, share
from leanmill.parallel.engine import Engine, Losses, Preparation, Wanted
from leanmill.parallel.frozen import shard_frozen
from leanmill.parallel.layout import Layout
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.parallel.optimizer_state import pulled
from leanmill.parallel.single import freeze
from leanmill.parallel.views_zero import ZeroViews


class DeepSpeedEngine(Engine):
    """ZeRO stages 0 to 3, with offload of optimizer state and parameters.

    Args:
        config: The engine section of the recipe.
        device: This rank's device.
        precision: `bf16` computes matmuls in bf16 under autocast over fp32 parameters.
        persist_below: ZeRO-3 keeps parameters with fewer elements gathered.
        layout: Of the run; None spreads nothing.

    Raises:
        ConfigError: The section asks for what this machine or the stage cannot do.
    """

    name = "deepspeed"

    def __init__(
        self,
        config: configs.DeepSpeedEngine,
        *,
        device: torch.device,
        precision: Literal["fp32", "bf16"] = "fp32",
        persist_below: int = PERSIST_BELOW,
        layout: Layout | None = None,
    ) -> None:
        check_config(config)
        self.config, self.device, self.precision, self.persist_below = config, device, precision, persist_below
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.data_rank, self.data_size = dist.get_rank(), dist.get_world_size()
        self.reduced_size = self.data_size
        set_data_group(None)
        self._mesh = cpu_mesh()
        self.layout = layout or Layout(self.data_size)
        start_deepspeed(device)
        self._experts = LocalExperts(self.layout, config.stage)

    def prepare(self, module: nn.Module, preparation: Preparation) -> None:
        import deepspeed

        self.module, self._preparation = module, preparation
        self._experts.spread(self._model)
        storage.give_storage(module, self._mesh, self.device, stage=self.config.stage)
        preparation.materialise(module)
        for owner, key, buffer in storage.own_tensors(module, "_buffers"):
            owner._buffers[key] = buffer.to(self.device)
        # Before ZeRO-3 empties the parameters: groups depend on their shapes.
        optimizer = preparation.make_optimizer(module)
        check_optimizer(optimizer)
        has_pulls = bool(pulled(optimizer))
        self._experts.localise(self._model, optimizer)
        # Of experts that ranks share, buckets are for what is here.
        ds_config = derive_config(
            self.config,
            module,
            device=self.device,
            precision=self.precision,
            num_micro_batches=preparation.num_micro_batches,
            max_grad_norm=preparation.max_grad_norm,
            persist_below=self.persist_below,
        )
        if self.config.stage == 3:
            storage.mark_experts(module)
            replaced = storage.partition(module, self.device, ds_config, before=self._experts.replace)
            for group in optimizer.param_groups:
                group["params"] = [replaced[id(p)] for p in group["params"]]
        # DeepSpeed refuses a mixture none of whose experts train.
        if self.config.stage < 3 and any(group.get("moe") for group in optimizer.param_groups):
            module.add_module("shares_experts", marker(self.layout.ep))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        module._modules.pop("shares_experts", None)
        if self.config.stage == 3:
            gather_unseen(self._optimizer)
        self._zero = ZeroState(self._optimizer, self.config.stage)
        self._client_optimizer = optimizer
        if has_pulls:
            self._zero.allocate()
        module.train()

    def forward_backward(self, micro_batches: Sequence[Batch], num_valid_tokens: Tensor) -> Losses:
        if len(micro_batches) != self._preparation.num_micro_batches:
            raise ValueError(
                f"got {len(micro_batches)} micro-batches, prepared for {self._preparation.num_micro_batches}"
            )
        # DeepSpeed averages over ranks as the others do; its division by the accumulation steps is
        # switched off, since micro-batches weigh by their tokens.
        scale = self._begin_backward(micro_batches, num_valid_tokens)
        sums: Losses = {}
        for index, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
            losses = self._run(batch)
            self._engine.backward(losses["total"] * scale, scale_wrt_gas=False)
            for name, value in losses.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        self._zero.has_gradients = True
        return sums

    def _run(self, batch: Batch, **options: Any) -> Losses:
        with _casts_of_their_own() if self.config.stage == 3 else nullcontext():
            return self._engine(batch, **options)

    def _look(self, batch: Batch) -> None:
        self._run(batch)

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> Tensor:
        if self.config.stage == 0:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            norm = self._experts.total_norm(parameters)
            if max_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            return norm
        self._optimizer.clip_grad = max_norm or 0.0
        return torch.as_tensor(self._zero.global_norm(), dtype=torch.float32, device=self.device).reshape(())

    def step(self, skip: Tensor) -> None:
        self._zero.forget_gradients()
        # Reading the flag waits for the device; DeepSpeed's own step does so for its norm anyway.
        if bool(skip):
            self._zero.drop_gradients()
            return
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()

    def set_trainable(self, names: Collection[str]) -> None:
        if set(names) != {name for name, _ in self._trained()}:
            raise ConfigError(
                "DeepSpeed cuts the parameters that train into flat partitions once, so the set is fixed; "
                "type engine=fsdp or engine=ddp"
            )

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, wanted: Wanted = "losses") -> Losses:
        self.module.eval()
        try:
            losses = self._run(batch) if wanted == "losses" else self._run(batch, wanted=wanted)
        finally:
            self.module.train()
        return {name: value.detach() for name, value in losses.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._zero.base.param_groups

    @property
    def views(self) -> Views:
        return ZeroViews(self._model, self._zero, self._experts)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained():
            yield name, self._experts.whole(parameter, self._zero.gradient(parameter))

    def full_parameter(self, name: str) -> Tensor:
        for candidate, parameter in state_parameters(self._model):
            if candidate == name:
                return self._experts.whole(parameter, self._zero.parameter(parameter)).detach().to("cpu", copy=True)
        raise KeyError(name)

    def model_state(self) -> dict[str, Tensor]:
        state = {name: self._hand_out(self._zero.parameter(p), p) for name, p in state_parameters(self._model)}
        return state | {name: self._experts.hand_out(b, b) for name, b in state_buffers(self._model)}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in state_parameters(self._model):
            self._zero.set_parameter(parameter, self._experts.part(parameter, state[name]).to(self.device))
        for name, buffer in state_buffers(self._model):
            buffer.copy_(self._experts.part(buffer, state[name]))

    def optimizer_state(self) -> dict[str, Tensor]:
        self._zero.allocate()
        state: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            element_wise, counters = self._zero.state_keys(parameter)
            for key in element_wise:
                state[f"{name}/{key}"] = self._hand_out(self._zero.state(parameter, key), parameter)
            for key in counters:
                state[f"{name}/{key}"] = self._zero.counter(parameter, key)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self._zero.allocate()
        for name, parameter in self._trained():
            element_wise, counters = self._zero.state_keys(parameter)
            for key in element_wise:
                part = self._experts.part(parameter, state[f"{name}/{key}"])
                self._zero.set_state(parameter, key, part.to(self.device))
            for key in counters:
                self._zero.set_counter(parameter, key, state[f"{name}/{key}"])

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Shard it where the trained model's weights are; DeepSpeed itself would want an engine of its own for that."""
        freeze(model, self.precision)
        if self.config.stage < 3 or self.data_size == 1:
            return model.to(self.device)
        mesh = self._mesh if self.device.type == "cpu" else init_device_mesh(self.device.type, (self.data_size,))
        return shard_frozen(model, mesh, self.device)

    def close(self) -> None:
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            engine.destroy()
        for held in ("_optimizer", "_zero", "_client_optimizer", "_preparation", "module"):
            self.__dict__.pop(held, None)
        del engine
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self._owns_group = False

    @property
    def _model(self) -> nn.Module:
        return self.module.model  # type: ignore[return-value]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in state_parameters(self._model) if p.requires_grad)

    def _hand_out(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Rows of what is sharded, as a DTensor on the CPU; what every rank holds whole stays plain."""
        if self._experts.is_part(parameter):
            return self._experts.hand_out(parameter, value)
        replicated = self.config.stage == 0 or (self.config.stage < 3 and not parameter.requires_grad)
        return value.detach() if replicated else share(value, self._mesh)


@contextmanager
def _casts_of_their_own() -> Iterator[None]:
    """Let autocast cast a weight anew at each use.

    It keeps its casts until the end of the forward otherwise: of a model whose weights are gathered in turn that is
    the whole model in bf16, and a weight used twice, as DoRA uses its own, meets in backward the cast of a gathering
    whose weight was let go in between.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
