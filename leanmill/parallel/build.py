"""From a recipe's engine section to an engine, and the reason for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from leanmill.core.errors import ConfigError, RunError
from leanmill.parallel.collectives import gather_objects, same_on_all_ranks
from leanmill.parallel.config import (
    AutoEngine,
    DdpEngine,
    DeepSpeedEngine,
    EngineConfig,
    FsdpEngine,
    LayoutConfig,
    SingleEngine,
)
from leanmill.parallel.engine import Engine
from leanmill.parallel.launch import Ranks, ensure_process_group
from leanmill.parallel.layout import Layout, resolve_layout
from leanmill.parallel.rank_memory import smallest_rank_memory


COMFORTABLE_SHARE = 0.5
"""Share of a rank's memory that weights, gradients and optimizer state may take under DDP; the rest
is for activations, which `auto` cannot know."""


def build_engine(
    config: EngineConfig,
    *,
    ranks: Ranks,
    precision: Literal["fp32", "bf16"],
    model_bytes: int,
    layout: LayoutConfig | None = None,
) -> tuple[Engine, str]:
    """Build the engine; all ranks call it together.

    Args:
        config: The recipe's engine section; `auto` is resolved here.
        ranks: Which process this is.
        precision: Compute precision.
        model_bytes: Bytes of the fp32 weights that a rank without sharding holds.
        layout: The recipe's layout section.

    Returns:
        The engine, not yet prepared, and one line on why it is this one.

    Raises:
        ConfigError: This engine cannot run on these ranks.
    """
    why, layout = "as the recipe asks", layout or LayoutConfig()
    if isinstance(config, AutoEngine):
        staging = config.staging
        config, why = choose_engine(ranks=ranks, precision=precision, model_bytes=model_bytes, layout=layout)
        config = config.model_copy(update={"staging": staging})
    resolved = resolve_layout(layout, config, ranks.world_size, ranks.device.type)
    _check_ranks_agree(resolved)
    engine = _make(config, ranks, precision, resolved)
    places = "1 process" if resolved.step_size == 1 else f"{resolved.step_size} ranks"
    places = places if resolved.workers == 1 else f"{places} of each of {resolved.workers} workers"
    places = ", ".join([places, *_shared(resolved)])
    return engine, f"engine {engine.name} on {places} ({ranks.device.type}, {precision}): {why}"


def _shared(layout: Layout) -> Iterator[str]:
    """Say what ranks share beside data."""
    if layout.fully_sharded is not None:
        yield "experts sharded over all of them"
    elif layout.ep > 1:
        yield f"experts over groups of {layout.ep}"
    if layout.tp > 1:
        yield f"matmuls shared by groups of {layout.tp}" + (", tokens split in between" * layout.sequence_parallel)
    if layout.pp > 1:
        yield f"blocks shared out among {layout.pp}"
    if layout.cp > 1:
        yield f"rows shared by groups of {layout.cp} ({layout.cp_attention})"


def _check_ranks_agree(layout: Layout) -> None:
    """Refuse ranks that would wait for each other in other groups.

    Raises:
        RunError: They were started with other layouts; the same on all ranks.
    """
    options = None if layout.fully_sharded is None else layout.fully_sharded.model_dump(mode="json")
    sizes = [
        layout.dp_shard,
        layout.tp,
        layout.ep,
        layout.expert_chunks,
        options,
        layout.workers,
        layout.cp,
        layout.cp_attention,
        layout.cp_rows,
        layout.sequence_parallel,
        layout.pp,
        layout.pp_schedule,
        layout.pp_split,
    ]
    if not same_on_all_ranks(sizes):
        found = ", ".join(f"rank {rank}: {one}" for rank, one in enumerate(gather_objects(sizes)))
        raise RunError(
            f"ranks differ in layout, [dp_shard, tp, ep, expert_chunks, experts, workers, cp, cp_attention, "
            f"cp_rows, sequence_parallel, pp, pp_schedule, pp_split] is {found}; start every rank with the same recipe"
        )


def choose_engine(
    *,
    ranks: Ranks,
    precision: Literal["fp32", "bf16"],
    model_bytes: int,
    memory_bytes: int | None = None,
    layout: LayoutConfig | None = None,
) -> tuple[EngineConfig, str]:
    """Pick an engine: single for one process, DDP where a replica fits comfortably, else FSDP.

    Args:
        ranks: Which process this is.
        precision: bf16 adds a bf16 copy of the weights under DDP.
        model_bytes: Bytes of the whole model's fp32 weights.
        memory_bytes: Memory of one rank; None asks the machine, and takes the smallest rank's.
        layout: The recipe's layout section; one that shards gets an engine that does.
    """
    if ranks.world_size <= (1 if layout is None else layout.num_workers):
        return SingleEngine(), "one process needs no sharding"
    if layout is not None and layout.dp_shard is not None:
        return FsdpEngine(), "layout.dp_shard shards parameters"
    # fp32 weights, gradients and AdamW's two moments; autocast adds the weights in bf16.
    factor = 4.5 if precision == "bf16" else 4.0
    needed = factor * model_bytes
    memory = memory_bytes if memory_bytes is not None else smallest_rank_memory(ranks)
    limit = COMFORTABLE_SHARE * memory
    sizes = (
        f"a replica needs {_gib(needed)} for weights, gradients and optimizer state ({factor:g} x {_gib(model_bytes)})"
    )
    if needed <= limit:
        return DdpEngine(), f"{sizes}, at most half of a rank's {_gib(memory)}, so nothing need be sharded"
    return FsdpEngine(), f"{sizes}, more than half of a rank's {_gib(memory)}, so it is sharded over the ranks"


def _make(config: EngineConfig, ranks: Ranks, precision: Literal["fp32", "bf16"], layout: Layout) -> Engine:
    # Imported here: each engine brings its own library, and DeepSpeed's costs seconds.
    if isinstance(config, SingleEngine):
        from leanmill.parallel.single import SingleEngine as Single

        return Single(config, ranks=ranks, precision=precision, layout=layout)
    if isinstance(config, DdpEngine):
        from leanmill.parallel.ddp import DdpEngine as Ddp

        return Ddp(config, ranks=ranks, precision=precision, layout=layout)
    if isinstance(config, FsdpEngine):
        from leanmill.parallel.fsdp import FsdpEngine as Fsdp

        return Fsdp(config, ranks=ranks, precision=precision, layout=layout)
    if isinstance(config, DeepSpeedEngine):
        from leanmill.parallel.deepspeed import DeepSpeedEngine as DeepSpeed

        ensure_process_group(ranks)
        return DeepSpeed(config, device=ranks.device, precision=precision, layout=layout)
    raise ConfigError(f"engine {config!r} is unknown; type engine=auto, single, ddp, fsdp or deepspeed")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
