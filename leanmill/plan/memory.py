"""Bytes a rank holds under each engine, from shapes alone.

Held parts live through the whole step and are exact up to alignment: weights, masters, gradients, optimizer
state, buffers that a library keeps. Transient parts come and go inside a step: gathered blocks, bf16
copies, activations, logits. What each engine allocates was read off its live tensors, and
`tests/plan/test_plan.py` holds the held parts against them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from leanmill.optim.config import Adam8bit, Lion, OptimizerConfig
from leanmill.parallel.config import DdpEngine, DeepSpeedEngine, EngineConfig, FsdpEngine, SingleEngine
from leanmill.parallel.staging import extra_bytes
from leanmill.plan.weight import Memory, Weight


ZERO3_MAX_LIVE_ELEMENTS = 1_000_000_000
"""ZeRO-3 frees no gathered parameter before this many elements are live (DeepSpeed's default)."""
_ADAM8BIT_BLOCK = 256
_ADAM8BIT_SMALLEST = 4096


def estimate(
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    weights: Sequence[Weight],
    *,
    world_size: int,
    precision: str,
    num_micro_batches: int,
) -> Memory:
    """Return the memory of one rank for weights, gradients, optimizer state and what moves them.

    Args:
        engine: The engine, not `auto`.
        optimizer: The optimizer section.
        weights: Every parameter of the model with its techniques.
        world_size: Ranks of the run.
        precision: `bf16` or `fp32`.
        num_micro_batches: Backward passes of a step on one rank.
    """
    if isinstance(engine, FsdpEngine):
        memory = _fsdp(engine, optimizer, weights, world_size, precision, num_micro_batches)
    elif isinstance(engine, DeepSpeedEngine) and engine.stage == 3:
        memory = _zero3(engine, optimizer, weights, world_size, precision)
    elif isinstance(engine, DeepSpeedEngine) and engine.stage > 0:
        memory = _zero12(engine, optimizer, weights, world_size, precision, num_micro_batches)
    elif isinstance(engine, SingleEngine | DdpEngine | DeepSpeedEngine):
        memory = _replicated(engine, optimizer, weights, precision)
    else:
        raise TypeError(f"the engine must be chosen first, got {engine.type!r}")
    # One weight at a time, in forward and again in backward.
    memory.add("transient", "decoded weights", max((w.decoded for w in weights), default=0))
    memory.add("transient", "watched gradients", sum(w.watched for w in weights if w.trainable))
    return memory


def is_staged_once(weight: Weight, engine: EngineConfig) -> bool:
    """Whether `engine` stages it once a step, where its copies fit."""
    if engine.staging == "per_use" or isinstance(engine, DeepSpeedEngine):
        return False
    return weight.once_in_parts if isinstance(engine, FsdpEngine) else weight.once_whole


def staged_copies(engine: EngineConfig, weights: Sequence[Weight], world_size: int, precision: str) -> float:
    """Return the bytes that a rank holds more because weights are staged once a step, as an engine counts them."""
    size = (engine.shard_size or world_size) if isinstance(engine, FsdpEngine) else None
    return sum(
        extra_bytes(
            w.numel,
            w.itemsize,
            is_table=w.is_table,
            precision=precision,
            num_shards=(w.sharers or size) if size else None,
        )
        for w in weights
        if is_staged_once(w, engine)
    )


def optimizer_bytes(optimizer: OptimizerConfig, sizes: Iterable[int]) -> float:
    """Return the bytes of optimizer state over parameters (or shards) of these numbers of elements.

    AdamW keeps two fp32 moments, Lion one; 8-bit AdamW keeps two bytes and two fp32 block scales
    for parameters it quantises (at least 4,096 elements, a multiple of 256). Lookahead adds fp32 slow weights.
    """
    total = 0.0
    for size in sizes:
        if isinstance(optimizer, Adam8bit) and size >= _ADAM8BIT_SMALLEST and size % _ADAM8BIT_BLOCK == 0:
            total += 2 * size * (1 + 4 / _ADAM8BIT_BLOCK)
        else:
            total += 4 * size * (1 if isinstance(optimizer, Lion) else 2)
        total += 4 * size if optimizer.lookahead is not None else 0
    return total


def _replicated(engine: EngineConfig, optimizer: OptimizerConfig, weights: Sequence[Weight], precision: str) -> Memory:
    """Every rank holds everything: single, DDP, ZeRO-0."""
    memory = Memory()
    _add_whole_weights(memory, weights)
    trained = [w for w in weights if w.trainable]
    memory.add("held", "gradients", sum(w.num_bytes for w in trained))
    memory.add("held", "optimizer state", optimizer_bytes(optimizer, (w.numel for w in trained)))
    memory.add("held", "optimizer state", 4 * sum(w.numel * w.num_written for w in trained))
    once = [w for w in weights if is_staged_once(w, engine)]
    memory.add("transient", "staged weights", sum(w.numel * copy_itemsize(w, precision) for w in once))
    memory.add("transient", "bf16 copies", _autocast_copies([w for w in weights if w not in once], precision))
    return memory


def copy_itemsize(weight: Weight, precision: str) -> int:
    """Bytes an element of a whole staged weight: of what autocast multiplies in bf16, 2."""
    return 2 if precision == "bf16" and not weight.is_table else weight.itemsize


def _add_whole_weights(memory: Memory, weights: Sequence[Weight]) -> None:
    for w in weights:
        memory.add("held", w.part, w.num_bytes)


def _autocast_copies(weights: Sequence[Weight], precision: str) -> int:
    # Autocast keeps a bf16 copy of each matrix from its forward to its backward.
    return sum(2 * w.numel for w in weights if len(w.shape) >= 2 and w.itemsize == 4) if precision == "bf16" else 0


def shard_numel(weight: Weight, shard_size: int) -> int:
    """Elements FSDP2 keeps of a parameter on each rank: whole rows, the last shard padded; of experts, even parts."""
    if weight.sharers is not None:
        return math.ceil(weight.numel / weight.sharers)
    rows, *rest = weight.shape or (1,)
    return math.ceil(rows / shard_size) * math.prod(rest)


def _fsdp(
    engine: FsdpEngine,
    optimizer: OptimizerConfig,
    weights: Sequence[Weight],
    world_size: int,
    precision: str,
    num_micro_batches: int,
) -> Memory:
    size = engine.shard_size or world_size
    memory = Memory()
    state: Literal["held", "host"] = "host" if engine.cpu_offload else "held"
    for w in weights:
        memory.add(state, w.part, shard_numel(w, size) * w.itemsize)
    trained = [w for w in weights if w.trainable]
    memory.add(state, "gradients", sum(shard_numel(w, size) * w.itemsize for w in trained))
    memory.add(state, "optimizer state", optimizer_bytes(optimizer, (shard_numel(w, size) for w in trained)))
    memory.add(state, "optimizer state", 4 * sum(shard_numel(w, size) * w.num_written for w in trained))
    if size == 1 and not engine.cpu_offload:
        return memory
    reduce = 2 if engine.reduce_dtype == "bf16" else 4
    groups = _groups(engine, weights, size, precision, reduce)
    root, blocks = groups.pop(None, _Group()), list(groups.values())
    largest = max((group.gathered for group in blocks), default=0)
    # One block is prefetched.
    gathered = sum(group.gathered for group in blocks) if not engine.reshard_after_forward else 2 * largest
    memory.add("transient", "gathered weights", root.gathered + gathered)
    memory.add(
        "transient" if state == "held" else "host",
        "staged weights",
        staged_copies(engine, weights, world_size, precision),
    )
    gradients = max(group.gradients for group in [*blocks, root])
    if not engine.reshard_after_forward and num_micro_batches > 1:
        gradients += reduce * sum(group.num_trained for group in [*blocks, root])
    memory.add("transient", "gradients in flight", gradients)
    return memory


@dataclass
class _Group:
    """What FSDP2 moves at once, padding included."""

    gathered: int = 0
    """Bytes of the weights."""
    num_trained: int = 0
    gradients: float = 0
    """Bytes: as they were computed, in the dtype of the reduction where that is another, and the share."""


def _groups(
    engine: FsdpEngine, weights: Sequence[Weight], size: int, precision: str, reduce: int
) -> dict[int | None, _Group]:
    """Return the group of each block, and of the rest, over `size` ranks."""
    groups: dict[int | None, _Group] = {}
    for w in weights:
        group = groups.setdefault(w.block, _Group())
        sharers = w.sharers or size
        whole = shard_numel(w, size) * sharers
        # bf16 gathers masks and codes, and what is staged at use, as they are.
        at_use = w.staged and not is_staged_once(w, engine)
        width = 2 if precision == "bf16" and w.itemsize > 1 and not at_use else w.itemsize
        group.gathered += whole * width
        if w.trainable:
            group.num_trained += whole
            group.gradients += whole * (width + (reduce if reduce != width else 0) + reduce / sharers)
    return groups


def _zero12(
    engine: DeepSpeedEngine,
    optimizer: OptimizerConfig,
    weights: Sequence[Weight],
    world_size: int,
    precision: str,
    num_micro_batches: int,
) -> Memory:
    """Whole weights, and this rank's flat fp32 partition of master, gradient and state."""
    from leanmill.parallel.deepspeed_config import BUCKET_ELEMENTS

    memory = Memory()
    _add_whole_weights(memory, weights)
    trained = sum(w.numel for w in weights if w.trainable)
    share = _zero12_share((w for w in weights if w.trainable), world_size)
    state: Literal["held", "host"] = "held" if engine.offload_optimizer is None else "host"
    memory.add(state, "master weights", 4 * share)
    memory.add(state, "gradients", 4 * share)
    memory.add(state, "optimizer state", optimizer_bytes(optimizer, [share]))
    for number in range(max((w.num_written for w in weights), default=0)):
        written = _zero12_share((w for w in weights if w.num_written > number), world_size)
        memory.add(state, "optimizer state", 4 * written)
    bucket = min(BUCKET_ELEMENTS, sum(w.numel for w in weights))
    # Stage 1 keeps whole gradients until the last micro-batch; stage 2 only those of a bucket.
    whole = trained if engine.stage == 1 and num_micro_batches > 1 else min(bucket, trained)
    memory.add("transient", "gradients in flight", 4 * whole)
    memory.add("transient", "reduction bucket", 4 * bucket)
    memory.add("transient", "bf16 copies", _autocast_copies(weights, precision))
    return memory


def _zero12_share(weights: Iterable[Weight], world_size: int) -> int:
    """Elements of a rank's flat partitions of these, of which those that fewer ranks share have their own."""
    total: dict[int, int] = defaultdict(int)
    for w in weights:
        total[w.sharers or world_size] += w.numel
    return sum(math.ceil(numel / size) for size, numel in total.items())


def _zero3(
    engine: DeepSpeedEngine, optimizer: OptimizerConfig, weights: Sequence[Weight], world_size: int, precision: str
) -> Memory:
    """Flat partitions of weights, master, gradient and state; small parameters stay gathered."""
    from leanmill.parallel.deepspeed_config import BUCKET_ELEMENTS, PERSIST_BELOW

    memory = Memory()
    weights_at: Literal["held", "host"] = "held" if engine.offload_parameters is None else "host"
    state: Literal["held", "host"] = "held" if engine.offload_optimizer is None else "host"
    for w in weights:
        share = math.ceil(w.numel / (w.sharers or world_size))
        memory.add(weights_at, w.part, share * w.itemsize)
        if w.trainable:
            memory.add(state, "master weights", 4 * share)
            memory.add(state, "gradients", 4 * share)
            memory.add(state, "optimizer state", optimizer_bytes(optimizer, [share]) + 4 * share * w.num_written)
        if w.numel < PERSIST_BELOW:
            memory.add("held", "small weights kept gathered", w.num_bytes)
    every = sum(w.numel for w in weights)
    memory.add("held", "reduction bucket", 4 * min(BUCKET_ELEMENTS, every))
    memory.add("transient", "gathered weights", 4 * min(every, ZERO3_MAX_LIVE_ELEMENTS))
    memory.add("transient", "gradients in flight", 4 * min(BUCKET_ELEMENTS, every))
    memory.add("transient", "bf16 copies", _autocast_copies(weights, precision))
    return memory
