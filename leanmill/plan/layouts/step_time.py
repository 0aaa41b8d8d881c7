"""How long an optimizer step takes under a layout, from the work of a model and the rates of ranks.

Time is the sum of what ranks compute, of communication that nothing hides, of waiting in a pipeline, and of the update.
Left out: what techniques do to weights, the data, and ranks of unequal speed.

- A matmul runs at the rate of large ones times d / (d + half_size) for each of its dims: `tp` makes layers
  narrower, `cp` and small micro-batches leave fewer rows, and experts get few rows each.
- Element-wise work goes through what a micro-batch keeps for backward some times, recomputation once more forward.
- A collective of a group sends (size - 1) / size of its bytes (twice that to reduce to all); the group's link is that
  between machines, times its members on one machine, where it spans machines.
- Gathers of weights hide behind all computing, reductions of gradients behind the last backward; activations, keys,
  values and tokens that travel hide behind nothing.
- A pipeline of p stages waits p - 1 micro-batches of m (1F1B: Narayanan et al., arXiv:2104.04473).
- Offload is done after backward, as DeepSpeed does it. `StepTime.offload_hideable` is what a schedule would hide
  that updates layers while backward goes on (Fuyou, arXiv:2403.06504).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from leanmill.optim.config import OptimizerConfig
from leanmill.parallel.config import DdpEngine, DeepSpeedEngine, EngineConfig, FsdpEngine
from leanmill.parallel.context_plan import sent_numbers
from leanmill.parallel.layout import Layout
from leanmill.plan.layouts.rates import Rates
from leanmill.plan.layouts.work import Work
from leanmill.plan.memory import optimizer_bytes


OPERATIONS_A_LAYER = 90
"""Kernels of a block's forward and backward."""
PASSES, COMPILED_PASSES = 6, 3
"""Times that element-wise work reads or writes what is kept for backward, forward and backward together."""
UPDATE_BYTES = 24
"""What an update reads and writes of a weight and its gradient, clipping included; beside the optimizer's state."""
_SENT = {False: (14, 2, 4), True: (10, 1, 6)}
"""By whether tokens are split as well (`sequence_parallel`), what ranks that share matmuls send, in shares of a hidden
state: in a layer, in one that is recomputed on top, outside of layers. From the guide on tensor parallelism."""


MATMULS, SMALL, ELEMENTWISE, RECOMPUTE = "matmuls", "small matmuls", "element-wise", "recomputation"
INSIDE, BETWEEN, BUBBLE, UPDATE, OFFLOAD = "links inside", "links between", "bubble", "update", "offload"
MEANING = {
    MATMULS: "at the rate of large ones",
    SMALL: "what narrow or short matmuls take on top",
    ELEMENTWISE: "element-wise work and starts of operations",
    RECOMPUTE: "forward once more in backward",
    INSIDE: "communication inside machines that nothing hides",
    BETWEEN: "communication between machines that nothing hides",
    BUBBLE: "stages of a pipeline that wait",
    UPDATE: "optimizer",
    OFFLOAD: "weights, gradients and optimizer state from and to host memory or NVMe",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A layout with what else the search chooses."""

    engine: EngineConfig
    layout: Layout
    pipeline: int
    tokens: int
    """Of a micro-batch, all ranks that share its rows together."""
    num_micro_batches: int
    recompute: str
    """`train.activation_checkpointing`."""
    is_compiled: bool = False
    kept_bytes: float
    """What a micro-batch keeps for backward without recomputation, on one rank."""


@dataclass(kw_only=True)
class StepTime:
    """Seconds of a step by what they go to."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANING, 0.0))
    bytes_between: float = 0.0
    """That a rank sends to other machines in a step."""
    bytes_inside: float = 0.0
    hidden_seconds: float = 0.0
    """Of communication that computing hides."""
    offload_hideable: float = 0.0
    """Of the offloaded update, what backward could hide."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())


@dataclass
class _Transfers:
    """Communication of a step on one rank, by whether it crosses machines."""

    rates: Rates
    per_node: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((INSIDE, BETWEEN), 0.0))
    num_bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys((INSIDE, BETWEEN), 0.0))

    def add(
        self, num_bytes: float, size: int, stride: int, *, times: float = 1.0, pieces: float = 1.0, kind: str = "gather"
    ) -> None:
        """Add `times` rounds of collectives of a group of `size` ranks, `stride` apart.

        Args:
            num_bytes: Of the whole: what is gathered or scattered, what is reduced, what a rank sends.
            size: Ranks of the group.
            stride: Ranks from one member to the next.
            times: How often.
            pieces: Collectives that one time is.
            kind: `gather` (or scatter; a ring), `reduce` (to all; a tree) or `send`.
        """
        if size <= 1 or not times * num_bytes:
            return
        members = max(1, min(size, self.per_node // stride))
        machines = size // members
        where = INSIDE if machines == 1 else BETWEEN
        share = {"gather": (size - 1) / size, "reduce": 2 * (size - 1) / size, "send": 1.0}[kind]
        hops, far = (size - machines, machines - 1) if kind == "gather" else (_rounds(members), _rounds(machines))
        starts = hops * self.rates.inside.seconds + far * self.rates.between.seconds
        self.seconds[where] += times * (share * num_bytes / self._speed(members, machines) + pieces * starts)
        self.num_bytes[where] += times * share * num_bytes

    def _speed(self, members: int, machines: int) -> float:
        """Bytes a second of a group: where it spans machines, a ring goes in and out of each once."""
        inside, between = self.rates.inside.bytes_per_second, self.rates.between.bytes_per_second
        if machines == 1:
            return inside
        return min(inside, members * between) if members > 1 else between


def _rounds(size: int) -> int:
    """Messages one after the other until a tree has been gone up and down."""
    return 2 * math.ceil(math.log2(size)) if size > 1 else 0


def predict(
    point: Point, work: Work, rates: Rates, *, per_node: int, precision: str, optimizer: OptimizerConfig
) -> StepTime:
    """Return the time of one optimizer step.

    Args:
        point: The layout, engine, micro-batch and recomputation.
        work: The model.
        rates: Of a rank and its links.
        per_node: Ranks of a machine.
        precision: `bf16` or `fp32`.
        optimizer: The optimizer section.
    """
    step = StepTime()
    forward, backward = _compute(step, point, work, rates)
    weights, last, rest = (_Transfers(rates, per_node) for _ in range(3))
    width = 2 if precision == "bf16" else 4
    _send_weights(weights, last, rest, point, work, width)
    _send_activations(rest, point, work, width)
    m = point.num_micro_batches
    free = rates.overlap * m * (forward + backward)
    free -= _hide(step, weights, free)
    _hide(step, last, min(free, rates.overlap * backward * (m if _reduces_each(point.engine) else 1)))
    _hide(step, rest, 0.0)
    if point.pipeline > 1:
        step.parts[BUBBLE] = (point.pipeline - 1) / m * sum(step.parts.values())
    _update(step, point, work, rates, optimizer, backward * m)
    return step


def _hide(step: StepTime, transfers: _Transfers, window: float) -> float:
    """Add what a window of computing does not hide, of each link in proportion; return what it hides."""
    total = sum(transfers.seconds.values())
    hidden = min(total, window)
    step.hidden_seconds += hidden
    for where, seconds in transfers.seconds.items():
        if seconds:
            step.parts[where] += seconds * (1 - hidden / total)
    step.bytes_inside += transfers.num_bytes[INSIDE]
    step.bytes_between += transfers.num_bytes[BETWEEN]
    return hidden


def _compute(step: StepTime, point: Point, work: Work, rates: Rates) -> tuple[float, float]:
    """Add what a rank computes in a step; return the seconds of one micro-batch, forward and backward."""
    layout, m = point.layout, point.num_micro_batches
    own = point.tokens / layout.cp
    large = work.flops_per_token * own / (layout.tp * point.pipeline) / rates.matmul_flops
    real = large * _slowness(point, work, rates, own)
    layers = work.num_layers / point.pipeline
    touched = (COMPILED_PASSES if point.is_compiled else PASSES) * point.kept_bytes / rates.memory.bytes_per_second
    starts = OPERATIONS_A_LAYER * layers * rates.memory.seconds
    # Starts that are ahead of the device cost only what computing does not cover.
    elementwise = max(touched, starts - real) if rates.starts_ahead else touched + starts
    step.parts[MATMULS] = m * large
    step.parts[SMALL] = m * (real - large)
    step.parts[ELEMENTWISE] = m * elementwise
    again = {"none": 0.0, "selective": elementwise / 3, "full": (real + elementwise) / 3}[point.recompute]
    step.parts[RECOMPUTE] = m * again
    return (real + elementwise) / 3, 2 * (real + elementwise) / 3 + again


def _slowness(point: Point, work: Work, rates: Rates, tokens: float) -> float:
    """How much longer matmuls of these sizes take than large ones."""

    def of(*dims: float) -> float:
        return math.prod(1 + rates.half_size / max(1.0, dim) for dim in dims)

    tp, layers = point.layout.tp, work.num_layers
    widths = (work.projected / 3 / tp, work.attended / tp, work.inner / max(1, work.top_k) / tp)
    dense = sum(of(tokens, work.hidden, width) for width in widths) / len(widths)
    if not work.num_experts or not layers:
        return dense
    rows = tokens * work.top_k * point.layout.ep / work.num_experts
    routed = of(rows, work.hidden, widths[2])
    return (1 - work.expert_flops_share) * dense + work.expert_flops_share * routed


def _reduces_each(engine: EngineConfig) -> bool:
    """Whether gradients are reduced in each micro-batch."""
    if isinstance(engine, FsdpEngine):
        return engine.reshard_after_forward
    return isinstance(engine, DeepSpeedEngine) and engine.stage >= 2


def _send_weights(
    weights: _Transfers, last: _Transfers, rest: _Transfers, point: Point, work: Work, width: int
) -> None:
    """Add gathers of weights, and reductions of gradients: of what is dense, and of experts."""
    engine, layout, m, p = point.engine, point.layout, point.num_micro_batches, point.pipeline
    parts = layout.tp
    dense = (work.dense + work.root - work.split + work.split / parts) / p
    root = work.root / parts
    trained = work.trained / max(1, work.dense + work.root + work.experts)
    data = layout.reduced_size
    experts, layers = work.experts / layout.ep / p, work.num_layers / p
    same = layout.step_size // layout.ep  # ranks with the same experts
    if isinstance(engine, FsdpEngine):
        reduce = 2 if engine.reduce_dtype == "bf16" else 4
        times = 2 if engine.reshard_after_forward else 1
        of_gradients = m if engine.reshard_after_forward else 1
        for numel, once, shard, replicate, stride in (
            (dense, root, layout.dp_shard, layout.dp_replicate, parts),
            (experts, 0.0, layout.expert_shard, layout.expert_replicate, layout.ep),
        ):
            weights.add(width * (numel - once), shard, stride, times=m * times, pieces=layers)
            weights.add(width * once, shard, stride, times=m)  # the root's stay from forward to backward
            last.add(reduce * numel * trained, shard, stride, times=of_gradients, pieces=layers)
            last.add(reduce * numel * trained / shard, replicate, stride * shard, pieces=layers, kind="reduce")
    elif isinstance(engine, DeepSpeedEngine):
        for numel, size, stride in ((dense, data, 1), (experts, same, layout.ep)):
            if engine.stage == 0:
                rest.add(4 * numel * trained, size, stride, kind="reduce")
            if engine.stage == 3:
                weights.add(4 * numel, size, stride, times=2 * m, pieces=layers)
            if engine.stage > 0:
                last.add(4 * numel * trained, size, stride, times=m if engine.stage > 1 else 1)
            if engine.stage in (1, 2):
                rest.add(4 * numel * trained, size, stride)
    elif isinstance(engine, DdpEngine):
        last.add(4 * dense * trained, data, parts, kind="reduce")
        last.add(4 * experts * trained, same, layout.ep, kind="reduce")


def _send_activations(rest: _Transfers, point: Point, work: Work, width: int) -> None:
    """Add what ranks that share matmuls, rows, experts or layers send each other in each micro-batch."""
    layout, m, layers = point.layout, point.num_micro_batches, work.num_layers / point.pipeline
    own = point.tokens / layout.cp
    again = 1 if point.recompute == "full" else 0
    state = own * work.hidden * width
    of_layer, of_again, outside = _SENT[layout.sequence_parallel]
    sends = layers * (of_layer + again * of_again) + outside / point.pipeline
    rest.add(state, layout.tp, 1, times=m * sends)
    if layout.cp > 1:
        # Of the heads that ranks which share matmuls leave each.
        heads, groups = work.num_heads // layout.tp, max(1, work.num_groups // layout.tp)
        sent = sent_numbers(heads, groups, work.head_dim, layout.cp, layout.cp_attention)
        rest.add(own * sent * width, layout.cp, layout.tp, times=m * layers * (2 + again), kind="send")
    if layout.ep > 1 and work.num_experts:
        elsewhere = math.comb(work.num_experts - work.num_experts // layout.ep, work.top_k)
        ranks = (layout.ep - 1) * (1 - elsewhere / math.comb(work.num_experts, work.top_k))
        # There and back, in forward and in backward.
        times = m * work.num_expert_layers / point.pipeline * 4
        rest.add(ranks * state, layout.ep, 1, times=times, kind="send")
    if point.pipeline > 1:
        rest.add(state, 2, layout.world_size // point.pipeline, times=2 * m, kind="send")


def _update(
    step: StepTime, point: Point, work: Work, rates: Rates, optimizer: OptimizerConfig, backward_seconds: float
) -> None:
    """Add the optimizer step, and what offload moves for it and for forward and backward."""
    engine, layout = point.engine, point.layout
    share = work.trained / point.pipeline / layout.tp
    if isinstance(engine, FsdpEngine):
        share /= layout.dp_shard
    elif isinstance(engine, DeepSpeedEngine) and engine.stage > 0:
        share /= layout.step_size
    elif work.num_experts:
        share = (work.trained - work.experts + work.experts / layout.ep) / point.pipeline
    state = optimizer_bytes(optimizer, [math.ceil(share)])
    moved = UPDATE_BYTES * share + 2 * state
    at, weights_at = _offloads(engine)
    if at is None:
        step.parts[UPDATE] = moved / rates.memory.bytes_per_second
    else:
        step.parts[OFFLOAD] = 8 * share / rates.host.bytes_per_second  # gradients down, weights up
        step.parts[UPDATE] = moved / rates.host_memory.bytes_per_second
        if at == "nvme":
            step.parts[OFFLOAD] += 2 * (state + 4 * share) / rates.nvme.bytes_per_second
        step.offload_hideable = min(step.parts[OFFLOAD] + step.parts[UPDATE], backward_seconds)
    if weights_at is not None:
        link = rates.host if weights_at == "cpu" else rates.nvme
        step.parts[OFFLOAD] += point.num_micro_batches * 2 * 4 * share / link.bytes_per_second


def _offloads(engine: EngineConfig) -> tuple[str | None, str | None]:
    """Where the optimizer's state is, and the weights: `cpu`, `nvme`, or None on the device."""
    if isinstance(engine, FsdpEngine):
        return ("cpu", "cpu") if engine.cpu_offload else (None, None)
    if isinstance(engine, DeepSpeedEngine):
        places = (engine.offload_optimizer, engine.offload_parameters)
        return tuple(None if place is None else place.device for place in places)  # type: ignore[return-value]
    return None, None
