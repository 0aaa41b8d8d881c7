"""The outer steps of workers that train by themselves in between: when they are, what they write, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leanmill.parallel.collectives import reduced
from leanmill.parallel.engine import Engine
from leanmill.parallel.launch import keep_timeout
from leanmill.parallel.low_comm.exchange import Exchange
from leanmill.parallel.low_comm.nesterov import nesterov_step
from leanmill.parallel.low_comm_config import DiLoCo
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.tensors import local


class OuterSteps:
    """DiLoCo (arXiv:2311.08105), Algorithm 1: all workers' weights are replaced by one outer step on where they met.

    Every `every_steps` optimizer steps, and after the last, the mean of `anchor - weights` over workers is the gradient
    of an SGD with Nesterov momentum whose values are the anchors; all workers go on from those. Moments of the inner
    optimizer stay each worker's own. Ranks that shard a worker's model do this for their own shards alone.

    It stands for the engine where state is saved and loaded: the model of the run are the anchors.

    Args:
        config: The recipe's `layout.low_comm`.
        engine: Prepared, of a worker.
    """

    def __init__(self, config: DiLoCo, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.layout = layout = engine.layout
        self.worker = layout.worker(dist.get_rank() if dist.is_initialized() else 0)
        self.exchange = Exchange(layout.across, layout.workers, config.gradient_dtype)
        weights = self._weights()
        self._anchors = {name: local(weight).clone() for name, weight in weights.items()}
        self._momenta = {name: torch.zeros_like(anchor) for name, anchor in self._anchors.items()}

    def _weights(self) -> dict[str, Tensor]:
        """What trains, by name, as it is now: sharding and optimizers may replace parameters."""
        model: nn.Module = self.engine.module.model  # type: ignore[assignment]
        return {name: p.detach() for name, p in state_parameters(model) if p.requires_grad}

    # Steps.

    def meets(self, step: int) -> bool:
        """Whether workers exchange something after `step` optimizer steps, unless the run ends there, where they do."""
        return step % self.config.every_steps == 0

    @torch.no_grad()
    def after_step(self, step: int, *, is_last: bool) -> None:
        """Do what is due after `step` optimizer steps."""
        if is_last or self.meets(step):
            self._outer_step()

    def _outer_step(self) -> None:
        weights = [local(weight) for weight in self._weights().values()]
        anchors, momenta = list(self._anchors.values()), list(self._momenta.values())
        gradients = self.exchange.begin(torch._foreach_sub(anchors, weights))()
        nesterov_step(anchors, momenta, gradients, lr=self.config.lr, momentum=self.config.momentum)
        torch._foreach_copy_(weights, anchors)

    def begin_max(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start an element-wise maximum over all ranks, at a step where workers meet; the function returned gives it.

        It goes through the ranks of a worker first, so that workers wait for each other here as patiently as in an
        exchange.
        """
        if self.layout.inside is not None:
            tensor = reduced(tensor, "max", self.layout.inside)
        result = tensor if self.layout.across is None else reduced(tensor, "max", self.layout.across)
        return lambda: result

    @contextmanager
    def global_weights(self) -> Iterator[None]:
        """Let the model have the anchors; for evaluation. Each worker's own weights come back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights().items():
            kept = local(weight).clone()
            local(weight).copy_(self._anchors[name])
            self._anchors[name].copy_(kept)

    def metrics(self) -> dict[str, float]:
        """Return numbers for a record."""
        return {"low_comm/sent_bytes": float(self.exchange.num_sent_bytes)}

    # State.

    def model_state(self) -> dict[str, Tensor]:
        """Return the run's model: that of the engine, with anchors for what trains."""
        return self.engine.model_state() | self._laid_out(self._anchors)

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Begin with a model: all workers and the anchors."""
        self.engine.load_model_state(state)
        for name, weight in self._weights().items():
            self._anchors[name].copy_(local(weight))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return that of this worker's optimizer."""
        return self.engine.optimizer_state()

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Give it to this worker's optimizer."""
        self.engine.load_optimizer_state(state)

    def outer_state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the outer optimizer's state, equal on all workers: live."""
        return {f"{name}/momentum": tensor for name, tensor in self._laid_out(self._momenta).items()}

    def load_outer_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Do nothing: it was read into the live tensors."""

    def worker_state(self) -> dict[str, Tensor]:
        """Return what is this worker's own: live."""
        own = {f"model/{name}": weight for name, weight in self._weights().items()}
        return own | {f"optimizer/{name}": tensor for name, tensor in self.engine.optimizer_state().items()}

    def load_worker_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `worker_state` returned, once a checkpoint was read into it."""
        prefix = "optimizer/"
        self.engine.load_optimizer_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _laid_out(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _like(weight, values[name]) for name, weight in self._weights().items()}


def _like(weight: Tensor, part: Tensor) -> Tensor:
    """Return this rank's part of a tensor laid out as `weight`, sharing its memory."""
    if not isinstance(weight, DTensor):
        return part
    where: Any = weight.device_mesh, weight.placements
    return DTensor.from_local(part, *where, run_check=False, shape=weight.shape, stride=weight.stride())


def outer_steps(config: DiLoCo, engine: Engine) -> OuterSteps:
    """Return what the workers of a prepared engine do together; collective."""
    if engine.layout.across is not None:
        keep_timeout(engine.layout.across, timedelta(seconds=config.patience_seconds))
    return OuterSteps(config, engine)
