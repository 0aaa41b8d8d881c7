"""What the torch-native engines (single, DDP, FSDP) share: everything but how they shard and sync."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import RunError
from leanmill.core.names import state_name
from leanmill.core.staging import StagedOnce
from leanmill.core.views import Views
from leanmill.parallel.collectives import set_data_group
from leanmill.parallel.context_rows import rows_of
from leanmill.parallel.engine import Engine, Losses, Preparation, Wanted
from leanmill.parallel.fssdp import OwnedExperts
from leanmill.parallel.launch import Ranks
from leanmill.parallel.layout import Layout
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.parallel.optimizer_state import allocate_state, pulled
from leanmill.parallel.pipeline import Pipeline
from leanmill.parallel.rank_memory import smallest_rank_memory
from leanmill.parallel.staging import ReplicaStaging, Staging, StepStaging, choose
from leanmill.parallel.tensor_parallel import PartialGradients, split_model
from leanmill.parallel.tensors import assign, full, global_norm, scale_to_norm
from leanmill.parallel.views import NativeViews


class TorchEngine(Engine):
    """Base of the engines whose optimizer sees the module's own parameters.

    Args:
        ranks: Which process this is.
        precision: `bf16` computes in bf16 over fp32 master weights.
        layout: Of the run, after the process group is there; None spreads nothing.
    """

    def __init__(self, *, ranks: Ranks, precision: Literal["fp32", "bf16"], layout: Layout | None = None) -> None:
        self.device, self._ranks = ranks.device, ranks
        self.layout = layout or Layout(ranks.world_size, device_type=ranks.device.type)
        self.data_rank, self.data_size = self.layout.data_rank(ranks.rank), self.layout.data_size
        self.reduced_size = self.layout.reduced_size
        self._rows = rows_of(self.layout)
        set_data_group(self.layout.data_group)
        self._pipeline = None if self.layout.pp == 1 else Pipeline(self.layout, self.device, self._autocast)
        self.precision = precision
        self._partial = PartialGradients((), None)
        self._optimizer: torch.optim.Optimizer | None = None
        self.staging: StepStaging = ReplicaStaging((), precision)
        """The weights that are staged once a step; those of `prepare`."""
        self._owned: OwnedExperts | None = None
        """The experts that each have one rank, where a layout shards them fully."""

    # How engines differ.

    @abstractmethod
    def _micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: whether gradients are reduced."""

    def _train_forward(self, batch: Batch) -> Losses:
        return self.module(batch)  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _settle(self) -> None:
        """Make the registered parameters the ones the optimizer writes."""

    def _trainable_changed(self) -> None:
        """Follow a change of which parameters train."""

    # Steps.

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, after `prepare`."""
        if self._optimizer is None:
            raise RuntimeError("the engine is not prepared, or closed")
        return self._optimizer

    def _staged_once(
        self, module: nn.Module, staging: Staging, num_shards: int | None = None, **options: Any
    ) -> list[StagedOnce]:
        """The weights to stage once a step, chosen before anything is sharded; `options` are those of `choose`."""
        if self.layout.tp > 1:
            options["reason_against"] = _reason_against_shared
        weights, line = choose(
            module,
            staging,
            precision=self.precision,
            num_shards=num_shards,
            memory_bytes=lambda: smallest_rank_memory(self._ranks),
            **options,
        )
        self.notes += (line,) if line else ()
        return weights

    def _split_matmuls(self, module: nn.Module, *, replicated: bool) -> None:
        """Let groups of ranks share matmuls where the layout asks for it, before anything else is sharded."""
        if self.layout.tp > 1:
            self._partial = split_model(module.model, self.layout, replicated=replicated)  # type: ignore[arg-type]
            self._partial.find(module)

    def _cut(self, module: nn.Module, preparation: Preparation) -> None:
        """Leave in a module on meta what this rank has of a pipeline, before anything else is done to it."""
        if self._pipeline is not None:
            self.notes = (self._pipeline.cut(module, preparation.num_micro_batches),)

    def _reduce_stage(self) -> None:
        """Average the gradients of a pipeline's stage over the ranks that have it; sharding engines have done so."""

    def _make_optimizer(self, preparation: Preparation) -> None:
        self._optimizer = preparation.make_optimizer(self.module)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        # Only a fused kernel reads the flag itself, on the device that holds the flag.
        self._skips_on_device = bool(getattr(self._optimizer, "_step_supports_amp_scaling", False)) and all(
            p.device.type == self.device.type for p in parameters
        )
        if self._owned is not None:
            self._owned.settle(self._optimizer)
        allocate_state(self._optimizer, pulled(self._optimizer))

    def forward_backward(self, micro_batches: Sequence[Batch], num_valid_tokens: Tensor) -> Losses:
        self.staging.begin()
        scale = self._begin_backward(micro_batches, num_valid_tokens)
        if self._pipeline is not None:
            return self._run_pipeline(self._pipeline, micro_batches, scale)
        sums: Losses = {}
        for index, batch in enumerate(micro_batches):
            with self._micro_batch(is_last=index == len(micro_batches) - 1):
                with self._autocast():
                    losses = self._train_forward(self._rows.part(batch))
                (losses["total"] * scale).backward()
            for name, value in losses.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        self._partial.add_up()
        self.staging.finish()
        return self._rows.total(sums)

    def _run_pipeline(self, pipeline: Pipeline, micro_batches: Sequence[Batch], scale: Tensor) -> Losses:
        sums = pipeline.run(micro_batches, scale)
        self._reduce_stage()
        self.staging.finish()
        pipeline.add_tied()
        return sums

    def _look(self, batch: Batch) -> None:
        with self._autocast():
            self.module(self._rows.part(batch))
        self._settle()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def clip(self, max_norm: float | None) -> Tensor:
        gradients = self._gradients()
        pipeline = self._pipeline
        norm = global_norm(gradients, self.device) if pipeline is None else pipeline.global_norm()
        if max_norm is not None:
            scale_to_norm(gradients, norm, max_norm)
        return norm

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        optimizer: Any = self.optimizer
        if self._skips_on_device:
            optimizer.found_inf = skip.to(self.device, torch.float32)
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf
        elif not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.staging.forget()
        if self._owned is not None:
            self._owned.after_step(optimizer)

    def set_trainable(self, names: Collection[str]) -> None:
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        known = {name: p for name, p in state_parameters(self._model) if id(p) in optimized}
        if unknown := sorted(set(names) - known.keys()):
            raise KeyError(f"the optimizer was not made for {unknown[0]}")
        changed = {name: p for name, p in known.items() if p.requires_grad != (name in names)}
        for parameter in changed.values():
            parameter.requires_grad_(not parameter.requires_grad)
            if not parameter.requires_grad:
                # The optimizer's groups go on naming it: without a gradient it is left alone.
                parameter.grad = None
                self.optimizer.state.pop(parameter, None)
        if changed:
            self._trainable_changed()

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, wanted: Wanted = "losses") -> Losses:
        was_training = self.module.training
        self.module.eval()
        try:
            with self._autocast(), self.staging.for_evaluation():
                if self._pipeline is not None:
                    return self._pipeline.evaluate(batch, wanted)
                part = self._rows.given(batch, wanted)
                found = self.module(part) if wanted == "losses" else self.module(part, wanted=wanted)
                return self._rows.found(found, wanted)
        finally:
            self.module.train(was_training)
            self._settle()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def _model(self) -> nn.Module:
        return self.module.model  # type: ignore[return-value]

    @property
    def views(self) -> Views:
        owned = (lambda parameter: False) if self._owned is None else self._owned.owns
        return NativeViews(self._model, self.optimizer, is_scattered=owned)

    # Values by name.

    def _handed_out(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return `tensor`, laid out like `parameter`, as others may see it."""
        return tensor if self._owned is None else self._owned.handed_out(parameter, tensor)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in state_parameters(self._model):
            if parameter.grad is not None:
                yield name, full(self._handed_out(parameter, parameter.grad))

    def full_parameter(self, name: str) -> Tensor:
        wanted = state_name(name)
        for known, parameter in state_parameters(self._model, aliases=True):
            if known == wanted:
                return full(self._handed_out(parameter, parameter.detach())).cpu().clone()
        raise KeyError(f"no parameter {name!r}")

    def model_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {name: self._handed_out(p, p.detach()) for name, p in state_parameters(self._model)}
        return state | {name: buffer.detach() for name, buffer in state_buffers(self._model)}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        known: dict[str, tuple[Tensor, Tensor]] = {n: (p, p) for n, p in state_parameters(self._model, aliases=True)}
        known |= {name: (buffer, buffer) for name, buffer in state_buffers(self._model)}
        self._load(known, state, "model")
        self.staging.forget()

    def optimizer_state(self) -> dict[str, Tensor]:
        return {name: self._handed_out(*pair) for name, pair in self._optimizer_tensors().items()}

    def _optimizer_tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each tensor of the optimizer's state by name, live, behind the parameter that it is of."""
        optimizer = self.optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        allocate_state(optimizer, trained)
        names = {id(p): name for name, p in state_parameters(self._model)}
        flat: dict[str, tuple[Tensor, Tensor]] = {}
        for parameter in trained:
            for key, value in optimizer.state[parameter].items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimizer state {key!r} is a {type(value).__name__}; checkpoints hold tensors")
                flat[f"{names[id(parameter)]}/{key}"] = (parameter, value)
        return flat

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        known = self._optimizer_tensors()
        missing = sorted(known.keys() - state.keys())
        if missing:
            raise RunError(
                f"the checkpoint lacks optimizer state {missing[0]} and {len(missing) - 1} more; resume with the "
                f"optimizer and techniques it was written with"
            )
        self._load(known, state, "optimizer")

    def _load(self, known: Mapping[str, tuple[Tensor, Tensor]], state: Mapping[str, Tensor], kind: str) -> None:
        for name, value in state.items():
            if name not in known:
                raise RunError(
                    f"the checkpoint's {kind} state holds {name}, which this run has not; use its own recipe"
                )
            parameter, target = known[name]
            try:
                if self._owned is None or not self._owned.take_in(parameter, target, value):
                    assign(target, value)
            except ValueError as error:
                raise RunError(f"the checkpoint's {kind} state does not fit at {name}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        return {} if self._owned is None else {"experts": self._owned.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._owned is not None and "experts" in state:
            self._owned.load_state_dict(state["experts"], self.optimizer)

    def close(self) -> None:
        self._optimizer = None
        set_data_group(None)


def _reason_against_shared(weight: StagedOnce) -> str | None:
    return None if weight.sites[0].split is None else "ranks share its matmul"
