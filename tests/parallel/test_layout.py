"""The sizes of a layout: what follows from what is given, and what is refused with the nearest that fits."""

from __future__ import annotations

import pytest

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import AutoEngine, DdpEngine, DeepSpeedEngine, EngineConfig, FsdpEngine, LayoutConfig
from leanmill.parallel.layout import resolve_layout


@pytest.mark.parametrize(
    ("layout", "engine", "world_size", "sizes"),
    [
        ({}, FsdpEngine(), 8, (8, 1, 1, 8, 1)),
        ({}, DdpEngine(), 8, (1, 8, 1, 1, 8)),
        ({"ep": 4}, DdpEngine(), 8, (1, 8, 4, 1, 2)),
        ({"ep": 4}, FsdpEngine(), 8, (8, 1, 4, 2, 1)),
        ({"ep": 2}, FsdpEngine(shard_size=4), 8, (4, 2, 2, 2, 2)),
        ({"ep": 2, "dp_replicate": 2}, FsdpEngine(), 8, (4, 2, 2, 2, 2)),
        ({"ep": 8, "dp_shard": 4}, FsdpEngine(), 16, (4, 4, 8, 1, 2)),
        ({"ep": 256}, FsdpEngine(), 1024, (1024, 1, 256, 4, 1)),
    ],
)
def test_sizes(layout: dict[str, int], engine: EngineConfig, world_size: int, sizes: tuple[int, ...]) -> None:
    found = resolve_layout(LayoutConfig(**layout), engine, world_size)
    assert (found.dp_shard, found.dp_replicate, found.ep, found.expert_shard, found.expert_replicate) == sizes
    assert found.dp_shard * found.dp_replicate == found.ep * found.expert_shard * found.expert_replicate == world_size
    assert found.data_size == world_size
    assert (found.divisor("dense"), found.divisor("expert")) == (1, found.ep)


@pytest.mark.parametrize(
    ("layout", "engine", "world_size", "sizes"),
    [
        ({"tp": 2}, DdpEngine(), 2, (1, 1, 1)),
        ({"tp": 2}, DdpEngine(), 8, (1, 4, 4)),
        ({"tp": 4}, FsdpEngine(), 8, (2, 1, 2)),
        ({"tp": 2, "dp_replicate": 2}, FsdpEngine(), 16, (4, 2, 8)),
        ({"tp": 8, "dp_shard": 16}, FsdpEngine(), 1024, (16, 8, 128)),
    ],
)
def test_sizes_where_matmuls_are_shared(
    layout: dict[str, int], engine: EngineConfig, world_size: int, sizes: tuple[int, ...]
) -> None:
    found = resolve_layout(LayoutConfig(**layout), engine, world_size)
    assert (found.dp_shard, found.dp_replicate, found.data_size) == sizes
    assert found.dp_shard * found.dp_replicate * found.tp == world_size
    shares = [found.data_rank(rank) for rank in range(world_size)]
    assert shares == sorted(shares)
    assert {shares.count(share) for share in range(found.data_size)} == {found.tp}


@pytest.mark.parametrize(
    ("layout", "engine", "sizes"),
    [
        ({"pp": 2}, DdpEngine(), (1, 4)),
        ({"pp": 2, "dp_shard": 2}, FsdpEngine(), (2, 2)),
        ({"pp": 8}, DdpEngine(), (1, 1)),
    ],
)
def test_ranks_of_a_pipeline_read_the_same_and_lie_far_apart(
    layout: dict[str, int], engine: EngineConfig, sizes: tuple[int, ...]
) -> None:
    found, apart = resolve_layout(LayoutConfig(**layout), engine, 8), 8 // layout["pp"]
    assert (found.dp_shard, found.dp_replicate) == sizes
    assert found.data_size == found.reduced_size == apart
    assert [found.data_rank(rank) for rank in range(8)] == [*range(apart)] * layout["pp"]


def test_workers_are_each_such_a_grid() -> None:
    config = LayoutConfig.model_validate({"low_comm": {"type": "diloco", "workers": 4}, "dp_shard": 4})
    found = resolve_layout(config, FsdpEngine(), 32)
    assert (found.workers, found.data_size, found.step_size, found.dp_shard, found.dp_replicate) == (4, 32, 8, 4, 2)
    assert [found.worker(rank) for rank in (0, 7, 8, 31)] == [0, 0, 1, 3]
    with pytest.raises(ConfigError, match=r"workers=4 does not divide the 6 ranks; set layout.low_comm.workers=3 or 6"):
        resolve_layout(config, FsdpEngine(), 6)


@pytest.mark.parametrize(
    ("layout", "engine", "world_size", "sizes"),
    [
        ({"cp": 2}, DdpEngine(), 2, (1, 2, 1)),
        ({"cp": 4}, FsdpEngine(), 8, (8, 1, 2)),
        ({"cp": 4, "dp_shard": 2}, FsdpEngine(), 16, (2, 8, 4)),
    ],
)
def test_ranks_that_share_rows_hold_weights_as_data_ranks_do(
    layout: dict[str, int], engine: EngineConfig, world_size: int, sizes: tuple[int, ...]
) -> None:
    found = resolve_layout(LayoutConfig(**layout), engine, world_size)
    assert (found.dp_shard, found.dp_replicate, found.data_size) == sizes
    assert found.reduced_size == world_size
    assert [found.data_rank(rank) for rank in (0, found.cp - 1, world_size - 1)] == [0, 0, found.data_size - 1]


def test_fully_sharded_experts_are_on_all_ranks() -> None:
    found = resolve_layout(LayoutConfig(experts="fully_sharded"), FsdpEngine(shard_size=2), 6)  # type: ignore[arg-type]
    assert (found.dp_shard, found.ep, found.expert_shard, found.expert_replicate) == (2, 6, 1, 1)
    assert found.divisor("expert") == 6


@pytest.mark.parametrize(
    ("layout", "engine", "world_size", "message"),
    [
        ({"ep": 3}, DdpEngine(), 8, r"layout.ep=3 does not divide the 8 ranks; set layout.ep=2 or 4"),
        ({"experts": "fully_sharded"}, AutoEngine(), 1, r"and there is one; start several, or remove it"),
        ({"ep": 2}, AutoEngine(), 1, r"layout.ep=2 does not divide the 1 rank; set layout.ep=1"),
        ({"ep": 6}, FsdpEngine(shard_size=4), 12, r"nor is a multiple of them; set layout.ep=4, or layout.dp_shard=6"),
        ({"tp": 3}, DdpEngine(), 8, r"layout.tp=3 does not divide the 8 ranks; set layout.tp=2 or 4"),
        ({"tp": 2}, DeepSpeedEngine(), 8, r"layout.tp=2 is for engines on torch alone, not for DeepSpeed"),
        ({"cp": 3}, DdpEngine(), 8, r"layout.cp=3 does not divide the 8 ranks; set layout.cp=2 or 4"),
        ({"pp": 2, "pp_schedule": "zbv"}, FsdpEngine(), 4, r"layout.pp_schedule=zbv takes backward apart"),
        ({"cp": 2}, DeepSpeedEngine(), 8, r"layout.cp=2 is for engines on torch alone, not for DeepSpeed"),
        ({"tp": 2, "dp_shard": 3}, FsdpEngine(), 8, r"the 4 ranks that layout.tp=2 leaves; set one of \[2, 4\]"),
        ({"dp_shard": 3}, FsdpEngine(), 8, r"layout.dp_shard=3 does not divide the 8 ranks; set one of \[2, 4, 8\]"),
        ({"dp_shard": 1}, FsdpEngine(), 8, r"layout.dp_shard=1 shards nothing; type engine=ddp"),
        ({"dp_replicate": 3}, FsdpEngine(), 8, r"set layout.dp_replicate=2 or 4"),
        ({"dp_replicate": 4, "dp_shard": 4}, FsdpEngine(), 8, r"are not the 8 ranks; set layout.dp_replicate=2"),
        (
            {"dp_replicate": 2},
            DdpEngine(),
            8,
            r"keeps a replica on each of the 8 ranks; remove it, or type",
        ),
    ],
)
def test_impossible_sizes_are_refused(
    layout: dict[str, int], engine: EngineConfig, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_layout(LayoutConfig(**layout), engine, world_size)
