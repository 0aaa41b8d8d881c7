"""Workers on the tiny model of the parity tests, and the same in plain tensors on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DdpEngine, FsdpEngine, LayoutConfig, SingleEngine
from leanmill.parallel.engine import Engine
from leanmill.parallel.low_comm.build import outer_steps
from leanmill.parallel.low_comm.outer import OuterSteps
from tests.parallel.cases import adamw, make_module, materialise, preparation, ranks_here, rows


def layout_of(**low_comm: Any) -> LayoutConfig:
    """DiLoCo, or whose option is given."""
    kind = {"keep_local": "streaming_diloco", "momentum_clip": "co2"}
    return LayoutConfig.model_validate(
        {"low_comm": {"type": next((v for k, v in kind.items() if k in low_comm), "diloco"), **low_comm}}
    )


def workers_here(
    engine: str, layout: LayoutConfig, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
) -> OuterSteps:
    """A prepared fp64 engine on all ranks, one of each worker's, and what workers do together."""
    config = {"single": SingleEngine, "ddp": DdpEngine, "fsdp": FsdpEngine}[engine]()
    built, _ = build_engine(config, ranks=ranks_here(), precision="fp32", model_bytes=1, layout=layout)
    built.prepare(make_module(), preparation(make_optimizer))
    assert layout.low_comm is not None
    return outer_steps(layout.low_comm, built)


def train(outer: OuterSteps, first: int, last: int, *, num_steps: int) -> None:
    """Take the steps `first` to `last` - 1 of a run of `num_steps`."""
    for step in range(first, last):
        _inner_step(outer.engine, step)
        outer.after_step(step + 1, is_last=step + 1 == num_steps)


def _inner_step(engine: Engine, step: int) -> None:
    workers = engine.layout.workers
    of_worker = _rows_of(step, engine.layout.worker(engine.data_rank), workers)
    num_valid = (of_worker["labels"] != -100).sum().float()
    rank = engine.data_rank % engine.layout.step_size
    mine = {name: value.chunk(engine.layout.step_size)[rank] for name, value in of_worker.items()}
    engine.forward_backward([{n: v.chunk(2)[i] for n, v in mine.items()} for i in range(2)], num_valid)
    engine.step(torch.tensor(False))


def _rows_of(step: int, worker: int, workers: int) -> dict[str, Tensor]:
    return {name: value.chunk(workers)[worker] for name, value in rows(step).items()}


class Plain:
    """The same workers in plain tensors: copies of a model, each with its AdamW, and a gradient for all."""

    def __init__(self, workers: int) -> None:
        module = make_module()
        materialise(module)
        self.models = [copy.deepcopy(module) for _ in range(workers)]
        self.optimizers = [adamw(model) for model in self.models]

    def inner_step(self, step: int) -> None:
        for worker, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            batch = _rows_of(step, worker, len(self.models))
            scale = 1 / (batch["labels"] != -100).sum().float()  # as engines have it, in fp32
            (model(batch)["total"] * scale).backward()
            optimizer.step()
            optimizer.zero_grad()

    def weights(self, worker: int) -> dict[str, Tensor]:
        named = self.models[worker].model.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}


def diloco(
    workers: int, num_steps: int, *, every_steps: int, lr: float, momentum: float, sent: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Algorithm 1 of DiLoCo with torch's own SGD as the outer optimizer; `sent` is what travels of a gradient."""
    plain = Plain(workers)
    shared = {name: nn.Parameter(value.clone()) for name, value in plain.weights(0).items()}
    outer = torch.optim.SGD(shared.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(num_steps):
        plain.inner_step(step)
        if (step + 1) % every_steps and step + 1 < num_steps:
            continue
        for name, value in shared.items():
            went = [sent(value.detach() - plain.weights(worker)[name]) for worker in range(workers)]
            value.grad = (torch.stack(went).sum(0) / workers).to(value.dtype)
        outer.step()
        for worker in range(workers):
            for name, weight in plain.weights(worker).items():
                weight.copy_(shared[name].detach())
    return {name: value.detach() for name, value in shared.items()}


def streaming(
    workers: int, num_steps: int, fragments: dict[str, int], *, tau: int, alpha: float, lr: float, momentum: float
) -> dict[str, Tensor]:
    """Algorithm 2 of Streaming DiLoCo, a weight at a time.

    Args:
        workers: M.
        num_steps: Of the run.
        fragments: After which step of each four a weight is sent, by a part of its name.
        tau: Steps until its mean comes in.
        alpha: Share of the local weight that is kept then.
        lr: Of the outer SGD.
        momentum: Of it.
    """
    plain = Plain(workers)
    shared = {name: nn.Parameter(value.clone()) for name, value in plain.weights(0).items()}
    outer = {name: torch.optim.SGD([p], lr=lr, momentum=momentum, nesterov=True) for name, p in shared.items()}
    under_way: dict[str, tuple[int, Tensor]] = {}

    def send(name: str, due: int) -> None:
        went = [shared[name].detach() - plain.weights(worker)[name] for worker in range(workers)]
        under_way[name] = due, torch.stack(went).mean(0)

    def take_in(name: str, kept: float) -> None:
        shared[name].grad = under_way.pop(name)[1]
        outer[name].step()
        for worker in range(workers):
            own = plain.weights(worker)[name]
            own.copy_(kept * own + (1 - kept) * shared[name].detach())

    for step in range(1, num_steps + 1):
        plain.inner_step(step - 1)
        is_last = step == num_steps
        for name in [name for name, (due, _) in under_way.items() if due == step or is_last]:
            take_in(name, alpha)
        for name in shared:
            offset = next((offset for part, offset in fragments.items() if part in name), fragments[""])
            if step % 4 == offset or is_last:
                send(name, step + tau)
            if is_last or (tau == 0 and name in under_way):
                take_in(name, 0.0 if is_last else alpha)
    return {name: value.detach() for name, value in shared.items()}
