"""The outer steps of workers that train by themselves in between: when they are, what they write, what is saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leanmill.parallel.collectives import collective_device, reduced
from leanmill.parallel.engine import Engine
from leanmill.parallel.low_comm.exchange import Exchange
from leanmill.parallel.low_comm.fragments import fragments_of
from leanmill.parallel.low_comm.nesterov import nesterov_step
from leanmill.parallel.low_comm.schedule import Schedule
from leanmill.parallel.low_comm_config import OuterConfig, StreamingDiLoCo
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.tensors import local


_MOMENTUM, _MEAN = "/momentum", "/mean"


class Fragment:
    """Weights that travel together, and what is under way of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.under_way: deque[tuple[int, Callable[[], list[Tensor]]]] = deque()
        """Means that were sent for: after how many steps each is taken in, and what waits for it."""

    def hold(self, due_step: int, means: list[Tensor]) -> None:
        """Keep means that have arrived before they are due."""
        self.under_way = deque([(due_step, lambda: means)])


class OuterSteps:
    """DiLoCo (arXiv:2311.08105), and the same a fragment at a time (Streaming DiLoCo, arXiv:2501.18512).

    Every `every_steps` optimizer steps the mean of `anchor - weights` over workers is the gradient of an SGD with
    Nesterov momentum whose values are the anchors; workers go on from those, or from a mix of them and their own
    weights. Fragments of a model take turns, and may be taken in some steps after they were sent. After the last step
    all that is under way is taken in, then everything is sent once more and waited for, and all workers have the
    anchors. Moments of the inner optimizer stay each worker's own. Ranks that shard a worker's model do this for their
    own shards alone.

    It stands for the engine where state is saved and loaded: the model of the run are the anchors.

    Args:
        config: The recipe's `layout.low_comm`.
        engine: Prepared, of a worker.
    """

    config: OuterConfig

    def __init__(self, config: OuterConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.layout = layout = engine.layout
        self.worker = layout.worker(dist.get_rank() if dist.is_initialized() else 0)
        self.exchange = Exchange(layout.across, layout.workers, config.gradient_dtype)
        weights = self._weights()
        self._anchors = {name: local(weight).clone() for name, weight in weights.items()}
        self._momenta = {name: torch.zeros_like(anchor) for name, anchor in self._anchors.items()}
        names = [list(weights)]
        if isinstance(config, StreamingDiLoCo):
            names = fragments_of(self._model, weights, config.layers_per_fragment)
        self.fragments = [Fragment(group) for group in names]
        self.schedule = Schedule(len(names), config.every_steps)

    def _weights(self) -> dict[str, Tensor]:
        """What trains, by name, as it is now: sharding and optimizers may replace parameters."""
        return {name: p.detach() for name, p in state_parameters(self._model) if p.requires_grad}

    @property
    def _model(self) -> nn.Module:
        return self.engine.module.model  # type: ignore[return-value]

    # Steps.

    def meets(self, step: int) -> bool:
        """Whether workers send something after `step` optimizer steps, unless the run ends there, where they do."""
        return bool(self.schedule.sent_after(step))

    @property
    def overlaps(self) -> bool:
        """Whether training goes on while what was sent is under way."""
        return self.config.overlap.steps > 0

    @torch.no_grad()
    def after_step(self, step: int, *, is_last: bool) -> None:
        """Do what is due after `step` optimizer steps."""
        overlap = self.config.overlap
        if is_last:
            self._finish(step)
            return
        for index in self.schedule.sent_after(step):
            self._send(self.fragments[index], step + overlap.steps)
        for fragment in self.fragments:
            if fragment.under_way and step >= fragment.under_way[0][0]:
                self._take_in(fragment, overlap.keep_local)

    def _finish(self, step: int) -> None:
        """Take in what is under way, and send and take in everything once more; all workers then have the anchors."""
        for fragment in self.fragments:
            if fragment.under_way:
                self._take_in(fragment, self.config.overlap.keep_local)
        for fragment in self.fragments:
            self._send(fragment, step)
        for fragment in self.fragments:
            self._take_in(fragment, 0.0)

    def _send(self, fragment: Fragment, due_step: int) -> None:
        weights = self._weights()
        own = [local(weights[name]) for name in fragment.names]
        gradients = torch._foreach_sub([self._anchors[name] for name in fragment.names], own)
        fragment.under_way.append((due_step, self.exchange.begin(gradients)))

    def _take_in(self, fragment: Fragment, keep_local: float) -> None:
        _, arrive = fragment.under_way.popleft()
        self._step(fragment.names, arrive())
        self._go_on_from_anchors(fragment, keep_local)

    def _go_on_from_anchors(self, fragment: Fragment, keep_local: float) -> None:
        weights = self._weights()
        own, anchors = ([local(of[name]) for name in fragment.names] for of in (weights, self._anchors))
        if keep_local:
            torch._foreach_lerp_(own, anchors, 1 - keep_local)
        else:
            torch._foreach_copy_(own, anchors)

    def _step(self, names: Sequence[str], gradients: list[Tensor]) -> None:
        """Step the anchors of some weights on their outer gradients, which are overwritten."""
        anchors, momenta = ([of[name] for name in names] for of in (self._anchors, self._momenta))
        nesterov_step(anchors, momenta, gradients, lr=self.config.lr, momentum=self.config.momentum)

    def begin_max(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start an element-wise maximum over all ranks, at a step where workers meet; the function returned gives it.

        It goes through the ranks of a worker first, so that workers wait for each other here as patiently as in an
        exchange, and only in the function.
        """
        if self.layout.inside is None or self.layout.across is None:
            return lambda: tensor.clone()
        result = reduced(tensor, "max", self.layout.inside).to(collective_device())
        work = dist.all_reduce(result, op=dist.ReduceOp.MAX, group=self.layout.across, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return result.to(tensor.device)

        return wait

    def meet(self) -> None:
        """Return once all workers are here."""
        self.begin_max(torch.zeros(1))()

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
        """Return the outer optimizer's state and means that are under way, which this waits for; live."""
        coming = self._under_way() if names is None else {}
        rooms = {name for name in names or () if name.endswith(_MEAN)}
        coming |= {name: torch.empty_like(self._anchors[name]) for name in self._anchors if name + _MEAN in rooms}
        state = {name + _MOMENTUM: tensor for name, tensor in self._laid_out(self._momenta).items()}
        return state | {name + _MEAN: tensor for name, tensor in self._laid_out(coming).items()}

    def _under_way(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for fragment in self.fragments:
            for due_step, arrive in tuple(fragment.under_way):  # one, between steps
                means = arrive()
                fragment.hold(due_step, means)
                found |= zip(fragment.names, means, strict=True)
        return found

    def load_outer_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take what `outer_state` returned, once that of a checkpoint after `step` steps was read into it."""
        for index, fragment in enumerate(self.fragments):
            if all(name + _MEAN in state for name in fragment.names):
                due_step = self.schedule.last_sent(index, step) + self.config.overlap.steps
                fragment.hold(due_step, [local(state[name + _MEAN]) for name in fragment.names])

    def worker_state(self) -> dict[str, Tensor]:
        """Return what is this worker's own: live."""
        own = {f"model/{name}": weight for name, weight in self._weights().items()}
        return own | {f"optimizer/{name}": tensor for name, tensor in self.engine.optimizer_state().items()}

    def load_worker_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `worker_state` returned, once a checkpoint was read into it."""
        prefix = "optimizer/"
        self.engine.load_optimizer_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _laid_out(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _like(weight, values[name]) for name, weight in self._weights().items() if name in values}


def _like(weight: Tensor, part: Tensor) -> Tensor:
    """Return this rank's part of a tensor laid out as `weight`, sharing its memory."""
    if not isinstance(weight, DTensor):
        return part
    where: Any = weight.device_mesh, weight.placements
    return DTensor.from_local(part, *where, run_check=False, shape=weight.shape, stride=weight.stride())
