"""Training a model in parts, each on its own ranks: torch's pipeline schedules over the stages of a rank.

Every rank of a pipeline reads the same rows and hands on hidden states alone. Losses are computed on the last stage;
what they came to is told to all. A loss is a sum over tokens divided by the valid tokens of the whole step, so
gradients of micro-batches add up, and nothing is averaged over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError, RunError
from leanmill.parallel.collectives import among, gather_objects, reduced
from leanmill.parallel.engine import Losses, Wanted
from leanmill.parallel.layout import Layout
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.pipeline_parts import Parts, sizes
from leanmill.parallel.pipeline_plan import balanced, pipeline_problems, rank_of_stage, stages_per_rank
from leanmill.parallel.tensors import local, squared_norm


_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}
Autocast = Callable[[], AbstractContextManager[Any]]


class Pipeline:
    """This rank's stages, and what travels between them.

    Args:
        layout: Of the run.
        device: Where this rank computes.
        autocast: Around every forward.
    """

    def __init__(self, layout: Layout, device: torch.device, autocast: Autocast) -> None:
        self._layout, self._device, self._autocast = layout, device, autocast
        self._group: dist.ProcessGroup = layout.stages.get_group("pp")
        self.rank = self._group.rank()
        pp, schedule = layout.pp, layout.pp_schedule
        self.num_stages = pp * stages_per_rank(schedule, pp, layout.pp_split)
        self._ranks = [rank_of_stage(stage, pp, schedule) for stage in range(self.num_stages)]
        self.own = [stage for stage, rank in enumerate(self._ranks) if rank == self.rank]
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._names: list[str] | None = None
        self.boundary_dtype: torch.dtype | None = None
        """Of hidden states that travel; None has them in the weights' own."""

    def cut(self, module: nn.Module, num_micro_batches: int) -> str:
        """Leave in a train module on meta what this rank holds; return a line on who has what.

        Raises:
            ConfigError: The model cannot be cut so.
        """
        model: nn.Module = module.model  # type: ignore[assignment]
        layout = self._layout
        problems = pipeline_problems(model.config, layout.pp, layout.pp_schedule, layout.pp_split, num_micro_batches)
        for problem in problems:
            raise ConfigError(problem)
        blocks, before, behind = sizes(model)
        firsts = list(layout.pp_split or balanced(blocks, before, behind, self.num_stages))
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.parts = Parts(model, firsts)
        self.parts.keep(self.own)
        self.module = module
        self._hidden_size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        ends = [*firsts[1:], len(blocks)]
        shown = [
            f"blocks {first} to {end - 1} on rank {rank}"
            for first, end, rank in zip(firsts, ends, self._ranks, strict=True)
        ]
        return f"pipeline ({layout.pp_schedule}): {', '.join(shown)} of each {layout.pp}"

    # Training.

    def run(self, micro_batches: Sequence[Batch], scale: Tensor) -> Losses:
        """Forward and backward of a step; return the losses summed over micro-batches, on every rank.

        Args:
            micro_batches: The rows of this pipeline, all of one shape.
            scale: What the sum over tokens is multiplied with before backward.
        """
        shape = micro_batches[0]["input_ids"].shape
        if any(batch["input_ids"].shape != shape for batch in micro_batches):
            raise ConfigError("layout.pp sends hidden states of one shape, and micro-batches differ in theirs")
        schedule, stages = self._schedule(shape, len(micro_batches))
        for stage in stages:
            stage.begin(micro_batches, scale)
        index = torch.arange(len(micro_batches))  # on the host, which stages read it on
        args = (index,) if 0 in self.own else ()
        target = index if self.num_stages - 1 in self.own else None
        try:
            schedule.step(*args, index=index, target=target, **_NO_OUTPUTS)
        except RuntimeError as error:
            # torch wraps what a stage raises.
            if isinstance(error.__cause__, ConfigError | RunError):
                raise error.__cause__ from error
            raise
        sums = next((stage.sums for stage in stages if stage.is_last), None)
        for stage in stages:
            stage.end()
        return self._told(sums)

    def _schedule(self, shape: Sequence[int], num_micro_batches: int) -> tuple[Any, list[_Stage]]:
        key = (*shape, num_micro_batches)
        if key not in self._schedules:
            self._schedules.clear()
            self._schedules[key] = self._made(shape, num_micro_batches)
        return self._schedules[key]  # type: ignore[no-any-return]

    def _made(self, shape: Sequence[int], num_micro_batches: int) -> tuple[Any, list[_Stage]]:
        modules = [_Stage(self, stage) for stage in self.own]
        hidden = torch.empty(*shape, self._hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
        index, loss = (
            torch.empty(1, dtype=torch.int64, device="meta"),
            torch.empty(1, device="meta", requires_grad=True),
        )
        stages = [
            PipelineStage(
                module,
                module.number,
                self.num_stages,
                self._device,
                input_args=(index if module.is_first else hidden,),
                output_args=(loss if module.is_last else hidden,),
                group=self._group,
            )
            for module in modules
        ]
        kind = _SCHEDULES[self._layout.pp_schedule]
        given: Any = stages[0] if self._layout.pp_schedule in ("gpipe", "1f1b") else stages
        schedule = kind(given, num_micro_batches, loss_fn=_own_loss, scale_grads=False)
        return schedule, modules

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states that travel."""
        return self.boundary_dtype or self._dtype

    def compute(self, stage: int, batch: Batch, hidden: Tensor | None, wanted: Wanted) -> Losses:
        """Run one of this rank's stages on a micro-batch: losses, or what is `wanted`, of the last; of others `hidden`.

        Args:
            stage: Which one.
            batch: The micro-batch.
            hidden: What the stage before gave, [B, S, H]; None for the first.
            wanted: Of the last stage.
        """
        is_last = stage == self.num_stages - 1
        with self.parts.active(stage, hidden), self._autocast():
            asked = wanted if is_last else "hidden_states"
            found: Losses = self.module(batch) if asked == "losses" else self.module(batch, wanted=asked)
        return found if is_last else {"hidden_states": found["hidden_states"].to(self.dtype)}

    def add_tied(self) -> None:
        """Add up the gradients of what the first and the last stage both hold, on both."""
        first, last = self._ranks[0], self._ranks[-1]
        if first == last or self.rank not in (first, last):
            return
        peer = dist.get_global_rank(self._group, last if self.rank == first else first)
        by_name = dict(state_parameters(self._model))
        for name in self.parts.tied():
            parameter = by_name[name]
            if parameter.grad is None:
                continue
            own = local(parameter.grad)
            other = torch.empty_like(own)
            ops = [dist.P2POp(dist.isend, own, peer, self._group), dist.P2POp(dist.irecv, other, peer, self._group)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            own.add_(other)

    def global_norm(self) -> Tensor:
        """L2 norm of the gradients of all stages, what two of them hold counted once; fp32 scalar, the same on all."""
        left_out = () if self._ranks[0] == self.rank else self.parts.tied()
        named = [(name, p.grad) for name, p in state_parameters(self._model) if p.grad is not None]
        own = squared_norm([gradient for name, gradient in named if name not in left_out], self._device)
        return reduced(own.double(), "sum", self._group).sqrt().float()

    # Without gradients.

    def evaluate(self, batch: Batch, wanted: Wanted) -> Losses:
        """Run all stages one after the other, and tell every rank what the last one gave."""
        hidden: Tensor | None = None
        found: Losses | None = None
        for stage in self.own:
            if stage > 0 and self._ranks[stage - 1] != self.rank:
                hidden = torch.empty(
                    *batch["input_ids"].shape, self._hidden_size, dtype=self.dtype, device=self._device
                )
                dist.recv(hidden, dist.get_global_rank(self._group, self._ranks[stage - 1]), group=self._group)
            found = self.compute(stage, batch, hidden, wanted)
            if stage < self.num_stages - 1:
                hidden = found["hidden_states"].contiguous()
                if self._ranks[stage + 1] != self.rank:
                    dist.send(hidden, dist.get_global_rank(self._group, self._ranks[stage + 1]), group=self._group)
        return self._handed_out(found if self.num_stages - 1 in self.own else None)

    def _told(self, sums: Losses | None) -> Losses:
        """Return the last stage's scalars on every rank."""
        last = self._ranks[-1]
        if self._names is None:
            with among(self._group):
                self._names = gather_objects([] if sums is None else list(sums))[last]
        values = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        if sums is not None:
            values = torch.stack([sums[name].double() for name in self._names])
        dist.broadcast(values, dist.get_global_rank(self._group, last), group=self._group)
        return dict(zip(self._names, values.float(), strict=True))

    def _handed_out(self, found: Losses | None) -> Losses:
        """Return the last stage's tensors on every rank."""
        last = self._ranks[-1]
        shown = [(name, list(value.shape), str(value.dtype)) for name, value in (found or {}).items()]
        with among(self._group):
            described = gather_objects(shown)[last]
        given: Losses = {}
        for name, shape, dtype in described:
            kind = getattr(torch, dtype.removeprefix("torch."))
            value = torch.empty(shape, dtype=kind, device=self._device) if found is None else found[name].contiguous()
            dist.broadcast(value, dist.get_global_rank(self._group, last), group=self._group)
            given[name] = value
        return given

    @property
    def _model(self) -> nn.Module:
        return self.module.model  # type: ignore[return-value]


class _Stage(nn.Module):
    """One stage as torch's schedules call it; its parameters are those it computes with.

    Args:
        pipeline: It is of.
        number: Of the stage.
    """

    def __init__(self, pipeline: Pipeline, number: int) -> None:
        super().__init__()
        self.number = number
        self.is_first, self.is_last = number == 0, number == pipeline.num_stages - 1
        self.held = nn.ModuleList(pipeline.parts.modules_of(number))
        self._compute = pipeline.compute
        self.sums: Losses = {}

    def begin(self, micro_batches: Sequence[Batch], scale: Tensor) -> None:
        """Take the micro-batches of a step."""
        self._micro_batches, self._scale, self.sums = micro_batches, scale, {}

    def end(self) -> None:
        """Let them go."""
        self._micro_batches = ()

    def forward(self, hidden: Tensor, *, index: Tensor) -> Tensor:
        """Return hidden states [B, S, H], or of the last stage what is differentiated, [1].

        Args:
            hidden: Of the stage before, [B, S, H]; the first gets something else, to be left alone.
            index: [1] int64, which micro-batch.
        """
        batch = self._micro_batches[int(index)]
        found = self._compute(self.number, batch, None if self.is_first else hidden, "losses")
        if not self.is_last:
            return found["hidden_states"]
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
        return (found["total"] * self._scale).reshape(1)


def _own_loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage has its labels itself. A tensor of its own: torch detaches what a stage returned."""
    return output.sum()


# Of torch 2.10 and newer: losses are summed by the stage, and micro-batches' need not be kept.
_NO_OUTPUTS: dict[str, Any] = (
    {"return_outputs": False} if "return_outputs" in inspect.signature(ScheduleGPipe.step).parameters else {}
)
