"""Which engine a run takes, what else could run it, and what people call it."""

from __future__ import annotations

from typing import Any

import torch

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import (
    AutoEngine,
    DdpEngine,
    DeepSpeedEngine,
    EngineConfig,
    FsdpEngine,
    LayoutConfig,
    SingleEngine,
)
from leanmill.recipe.root import Recipe


def engine_of(
    recipe: Recipe, world_size: int, per_node: int, model_bytes: int, rank_memory_gib: float
) -> tuple[EngineConfig, str]:
    """Return the engine that would run, and why."""
    from leanmill.parallel.build import choose_engine
    from leanmill.parallel.launch import Ranks

    engine = recipe.engine
    if isinstance(engine, AutoEngine):
        ranks = Ranks(
            rank=0, world_size=world_size, local_rank=0, device=torch.device("cpu"), local_world_size=per_node
        )
        return choose_engine(
            ranks=ranks,
            precision="bf16" if recipe.train.precision == "bf16" else "fp32",
            model_bytes=model_bytes,
            memory_bytes=int(rank_memory_gib * 2**30),
            layout=recipe.layout,
        )
    if isinstance(engine, SingleEngine) and world_size > recipe.layout.num_workers:
        raise ConfigError(f"engine=single runs one process, not {world_size}; type engine=ddp or engine=fsdp")
    if isinstance(engine, FsdpEngine) and engine.shard_size is not None and world_size % engine.shard_size:
        raise ConfigError(
            f"engine.shard_size={engine.shard_size} does not divide {world_size} ranks; remove it, or set a divisor"
        )
    return engine, "as the recipe asks"


def candidates(world_size: int, layout: LayoutConfig) -> list[EngineConfig]:
    """Return the engines that run on this many ranks with this layout."""
    if world_size <= layout.num_workers:
        return [SingleEngine()]
    if {layout.dp_shard, layout.dp_replicate} - {None}:
        return [FsdpEngine()]
    if (
        layout.experts.type == "fully_sharded"
        or max(layout.tp, layout.cp, layout.pp) > 1
        or layout.low_comm is not None
    ):
        return [DdpEngine(), FsdpEngine()]
    stages: tuple[Any, ...] = (0, 1, 2, 3)
    return [DdpEngine(), FsdpEngine(), *(DeepSpeedEngine(stage=stage) for stage in stages)]


def label(engine: EngineConfig) -> str:
    """Name an engine with the settings that decide its memory."""
    if isinstance(engine, DeepSpeedEngine):
        offloads = [name for name in ("optimizer", "parameters") if getattr(engine, f"offload_{name}") is not None]
        return f"deepspeed ZeRO-{engine.stage}" + (f" + offload of {' and '.join(offloads)}" if offloads else "")
    if isinstance(engine, FsdpEngine):
        return (
            f"fsdp{f' x{engine.shard_size}' if engine.shard_size else ''}{' + offload' if engine.cpu_offload else ''}"
        )
    return engine.type
