"""How ranks share the work: which of them hold the same parameters, and how gradients become means.

One table for every engine. Ranks form a grid; what is spread over a dim of it, and what the others do with
it, depends on the family of a parameter:

| family | a rank holds | its gradient is the mean over | divided before by |
|---|---|---|---|
| dense | all, or a share among `dp_shard` ranks | all ranks | 1 |
| expert | num_experts / ep, or a share of those | the ranks with the same experts | ep |

Fully sharded experts are those of an `ep` of all ranks, more on one rank than on another.

Ranks of a tensor-parallel group (`tp`, neighbours) share each layer's matmuls and read the same data. A weight that
they split is dense in everything else: the mean is over the ranks with the same part. Other ranks read data of their
own, those that share experts too. The tokens of all `ep` ranks of a group
meet at one expert, whose gradient is therefore the sum of theirs.

Ranks of a context-parallel group (`cp`, neighbours) read the same data, and each computes a part of every row. To a
dense parameter they are as ranks that read different data: a loss is a sum over tokens, each of which one rank of all
has, so its gradient is the sum over all ranks of what each one's own tokens give. What goes through attention comes
back through the transposed exchange, so that it is counted once, at the rank of the token it came from. Losses are
scaled up by the ranks that a reduction averages, `reduced_size`, which are these and those that read other data.

Both may be: each of a row's parts is then with `tp` neighbours that share matmuls, and heads are shared twice, first
by those and then, where attention exchanges heads for places, by the ranks of the row.

Ranks of a pipeline (`pp`, far apart: what travels between them is least) each have some of a model's blocks, and read
the same data. Every other group is among ranks with the same blocks, which are neighbours; what first and last stage
both hold, tied embeddings, has the sum of both stages' gradients.

Workers that train with little communication (`layout.low_comm`) are each such a grid: "all ranks" are then those of
one worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_divisors
from leanmill.parallel.config import DeepSpeedEngine, EngineConfig, FsdpEngine, FullyShardedExperts, LayoutConfig
from leanmill.parallel.pipeline_plan import Schedule


Family = Literal["dense", "expert"]


@dataclass(frozen=True)
class Layout:
    """The sizes of the grid. Meshes are made where they are first asked for, by all ranks together."""

    world_size: int
    dp_shard: int = 1
    """Ranks that a dense parameter is sharded over."""
    ep: int = 1
    """Ranks that share the experts of a layer; neighbours, since tokens travel between them."""
    tp: int = 1
    """Ranks that share each layer's matmuls; neighbours, since activations travel between them."""
    sequence_parallel: bool = False
    """Whether those split tokens between the matmuls."""
    cp: int = 1
    """Ranks that share every row; neighbours, since keys and values travel between them."""
    cp_attention: Literal["ulysses", "all_gather"] = "ulysses"
    """How those attend."""
    cp_rows: Literal["even", "by_document"] = "even"
    """What each of those has of a row."""
    pp: int = 1
    """Ranks that each have some of the blocks; neighbours have the same ones."""
    pp_schedule: Schedule = "1f1b"
    """In which order those take micro-batches."""
    pp_split: tuple[int, ...] | None = None
    """First blocks of stages; None balances parameters."""
    device_type: str = "cpu"
    expert_chunks: int = 1
    """Pieces of a rank's tokens that travel to experts one after the other."""
    fully_sharded: FullyShardedExperts | None = None
    """How experts are sharded over all ranks, `ep` being all of them; None where ranks share them evenly."""
    workers: int = 1
    """Groups of neighbouring ranks that step without each other."""

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return self.world_size // (self.tp * self.cp * self.pp)

    def data_rank(self, rank: int) -> int:
        """Return which share of the data a rank reads, in [0, data_size)."""
        return self.rank_in_stage(rank) // (self.tp * self.cp)

    def rank_in_stage(self, rank: int) -> int:
        """Return a rank's number among those with the same blocks."""
        return rank % (self.world_size // self.pp)

    @property
    def reduced_size(self) -> int:
        """Ranks that a dense parameter's gradient is averaged over: those of a worker that compute different tokens."""
        return self.step_size // (self.tp * self.pp)

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that read different data and share matmuls and rows as this one; None where those are all ranks."""
        if self.pp > 1:
            return self.stages.get_group("data")
        return self.rows.get_group("data") if self.cp > 1 else self.token_group

    @cached_property
    def stages(self) -> DeviceMesh:
        """All ranks, where each has some blocks: `pp` x `data`."""
        return init_device_mesh(self.device_type, (self.pp, self.data_size), mesh_dim_names=("pp", "data"))

    @cached_property
    def rows(self) -> DeviceMesh:
        """All ranks, where rows are shared: `data` x `cp` x `tp`; ranks that share matmuls have the same parts."""
        shape = (self.data_size, self.cp, self.tp)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("data", "cp", "tp"))

    def neighbours(self, size: int) -> dist.ProcessGroup:
        """Return this rank's group where all ranks form groups of `size` neighbours. Made by all ranks together."""
        shape = (self.world_size // size, size)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("group", "part")).get_group("part")

    @cached_property
    def token_group(self) -> dist.ProcessGroup | None:
        """The ranks that compute different tokens and share matmuls as this one; None where those are all ranks."""
        if self.tp == 1:
            return None
        if 1 in (self.dp_replicate, self.dp_shard):
            return self.grid.get_group("shard" if self.dp_replicate == 1 else "replicate")
        return self.grid["replicate", "shard"]._flatten("data").get_group()

    @property
    def step_size(self) -> int:
        """Ranks that step together: all, or those of a worker."""
        return self.world_size // self.workers

    def worker(self, rank: int) -> int:
        """Return which worker a rank is of."""
        return rank // self.step_size

    @property
    def inside(self) -> dist.ProcessGroup | None:
        """The ranks that step together with this one; None where those are all ranks."""
        return None if self.workers == 1 else self._of_workers.get_group("rank")

    @property
    def across(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same of a model as this one, one of each worker; None where there is one worker."""
        return None if self.workers == 1 else self._of_workers.get_group("worker")

    @cached_property
    def _of_workers(self) -> DeviceMesh:
        shape = (self.workers, self.step_size)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("worker", "rank"))

    @property
    def dp_replicate(self) -> int:
        """Replicas of a dense parameter."""
        return self.step_size // (self.dp_shard * self.tp * self.pp)

    @property
    def expert_shard(self) -> int:
        """Ranks that share one rank's experts further, cut along a dim of their weights."""
        return max(1, self.dp_shard // self.ep)

    @property
    def expert_replicate(self) -> int:
        """Replicas of an expert, or of each part of it."""
        return self.step_size // (self.ep * self.expert_shard)

    def divisor(self, family: Family) -> int:
        """Return what a gradient is divided by before it is averaged over the ranks that hold the parameter."""
        return self.ep if family == "expert" else 1

    @cached_property
    def dense(self) -> DeviceMesh:
        """Mesh of a dense parameter: `shard`, or `replicate` x `shard`; neighbours share, they are on one machine."""
        if self.tp > 1:
            return self.grid["shard"] if self.dp_replicate == 1 else self.grid["replicate", "shard"]
        if self.dp_replicate == 1:
            return self._mesh(shard=self.dp_shard)
        return self._mesh(replicate=self.dp_replicate, shard=self.dp_shard)

    @cached_property
    def grid(self) -> DeviceMesh:
        """All ranks, where matmuls are shared: `replicate` x `shard` x `tp`."""
        shape = (self.dp_replicate, self.dp_shard, self.tp)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("replicate", "shard", "tp"))

    @cached_property
    def experts(self) -> DeviceMesh:
        """Mesh of an expert parameter: `replicate` x `shard` x `ep`."""
        return self._mesh(replicate=self.expert_replicate, shard=self.expert_shard, ep=self.ep)

    def _mesh(self, **sizes: int) -> DeviceMesh:
        """Return a mesh of the ranks that step together with this one."""
        names = tuple(sizes)
        groups = self.workers * self.pp  # one of the two is 1
        if groups == 1:
            return init_device_mesh(self.device_type, tuple(sizes.values()), mesh_dim_names=names)
        shape = (groups, *sizes.values())
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("group", *names))[names]


def resolve_layout(config: LayoutConfig, engine: EngineConfig, world_size: int, device_type: str = "cpu") -> Layout:
    """Return the layout of a run.

    Args:
        config: The recipe's layout section.
        engine: Its engine section, `auto` resolved.
        world_size: Ranks of the run.
        device_type: Where it computes.

    Raises:
        ConfigError: The sizes do not fit the ranks, or each other; the message names the nearest that do.
    """
    workers = config.num_workers
    if world_size % workers:
        raise ConfigError(
            f"layout.low_comm.workers={workers} does not divide the {_ranks(world_size)}; "
            f"set layout.low_comm.workers={near_divisors(workers, world_size)}"
        )
    if workers > 1:
        alone = config.model_copy(update={"low_comm": None})
        inner = resolve_layout(alone, engine, world_size // workers, device_type)
        return replace(inner, world_size=world_size, workers=workers)
    tp, data_size = config.tp, config.data_size(world_size)
    for key, size in (("tp", tp), ("cp", config.cp), ("pp", config.pp)):
        if size > 1 and isinstance(engine, DeepSpeedEngine):
            raise ConfigError(f"layout.{key}={size} is for engines on torch alone, not for DeepSpeed; type engine=fsdp")
    dp_shard = _dp_shard(config, engine, data_size * config.cp, tp)
    if max(tp, config.cp) > 1:
        how: dict[str, Any] = {"sequence_parallel": config.sequence_parallel}
        how |= {"cp_attention": config.cp_attention, "cp_rows": config.cp_rows}
        return Layout(world_size, dp_shard, tp=tp, cp=config.cp, device_type=device_type, **how)
    if config.pp > 1:
        if config.pp_schedule == "zbv" and isinstance(engine, FsdpEngine):  # that `auto` may have chosen
            raise ConfigError(
                "layout.pp_schedule=zbv takes backward apart, which sharded blocks do not allow; type engine=ddp, or "
                "set layout.pp_schedule=interleaved_1f1b"
            )
        return Layout(
            world_size,
            dp_shard,
            pp=config.pp,
            pp_schedule=config.pp_schedule,
            pp_split=None if config.pp_split == "balance" else config.pp_split,
            device_type=device_type,
        )
    if isinstance(config.experts, FullyShardedExperts):
        if world_size == 1:
            raise ConfigError(
                "layout.experts=fully_sharded shards experts over ranks, and there is one; start several, or remove it"
            )
        return Layout(world_size, dp_shard, world_size, device_type=device_type, fully_sharded=config.experts)
    ep = config.ep
    if world_size % ep:
        raise ConfigError(
            f"layout.ep={ep} does not divide the {_ranks(world_size)}; set layout.ep={near_divisors(ep, world_size)}"
        )
    if dp_shard % ep and ep % dp_shard:
        raise ConfigError(
            f"layout.ep={ep} neither divides the {dp_shard} ranks that parameters are sharded over nor is a multiple "
            f"of them; set layout.ep={near_divisors(ep, dp_shard)}, or layout.dp_shard={ep}"
        )
    return Layout(world_size, dp_shard, ep, device_type=device_type, expert_chunks=config.expert_chunks)


def _dp_shard(config: LayoutConfig, engine: EngineConfig, world_size: int, tp: int = 1) -> int:
    """Ranks that a dense parameter is sharded over; 1 where an engine keeps replicas or shards in its own way.

    Args:
        config: The recipe's layout section.
        engine: Its engine section.
        world_size: Ranks that read different data.
        tp: Ranks that share the matmuls of each of them.
    """
    ranks = _ranks(world_size) if tp == 1 else f"{_ranks(world_size)} that layout.tp={tp} leaves"
    if not isinstance(engine, FsdpEngine):
        if config.dp_replicate not in (None, world_size) and not isinstance(engine, DeepSpeedEngine):
            raise ConfigError(
                f"layout.dp_replicate={config.dp_replicate}, and engine={engine.type} keeps a replica on each of the "
                f"{ranks}; remove it, or type engine=fsdp"
            )
        return 1
    key = "engine.shard_size" if engine.shard_size is not None else "layout.dp_shard"
    asked = engine.shard_size or config.dp_shard
    if asked is None and config.dp_replicate is None:
        return world_size
    if asked is None:
        if world_size % config.dp_replicate:  # type: ignore[operator]
            raise ConfigError(
                f"layout.dp_replicate={config.dp_replicate} does not divide the {ranks}; "
                f"set layout.dp_replicate={near_divisors(config.dp_replicate or 1, world_size)}"
            )
        asked, key = world_size // (config.dp_replicate or 1), "layout.dp_shard"
    elif world_size % asked:
        divisors = [d for d in range(2, world_size + 1) if world_size % d == 0]
        raise ConfigError(f"{key}={asked} does not divide the {ranks}; set one of {divisors or [1]}")
    elif config.dp_replicate is not None and config.dp_replicate * asked != world_size:
        raise ConfigError(
            f"layout.dp_replicate={config.dp_replicate} x {key}={asked} are not the {ranks}; "
            f"set layout.dp_replicate={world_size // asked}"
        )
    if asked == 1 and world_size > 1:
        raise ConfigError(f"{key}=1 shards nothing; type engine=ddp, or set {key}=2 or more")
    return asked


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
