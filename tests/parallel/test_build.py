"""Which engine a recipe gets, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from leanmill.core.errors import ConfigError, RunError
from leanmill.parallel.build import build_engine, choose_engine
from leanmill.parallel.config import AutoEngine, DdpEngine, FsdpEngine, LayoutConfig, SingleEngine
from leanmill.parallel.launch import Ranks
from tests.distributed import run_ranks
from tests.parallel import cases


GIB = 2**30


def ranks_of(world_size: int) -> Ranks:
    return Ranks(rank=0, world_size=world_size, local_rank=0, device=torch.device("cpu"))


def test_auto_on_one_process_is_single() -> None:
    engine, why = build_engine(AutoEngine(), ranks=ranks_of(1), precision="fp32", model_bytes=10**15)
    assert engine.name == "single"
    assert why == "engine single on 1 process (cpu, fp32): one process needs no sharding"


@pytest.mark.parametrize(
    ("precision", "model_gib", "expected"),
    # Half of 16 GiB is 8; a replica takes 4 (fp32) or 4.5 (bf16) times the weights.
    [("fp32", 2.0, DdpEngine), ("fp32", 2.01, FsdpEngine), ("bf16", 1.77, DdpEngine), ("bf16", 1.78, FsdpEngine)],
)
def test_auto_shards_what_does_not_fit_comfortably(precision: str, model_gib: float, expected: type) -> None:
    config, why = choose_engine(
        ranks=ranks_of(2), precision=precision, model_bytes=int(model_gib * GIB), memory_bytes=16 * GIB
    )
    assert type(config) is expected
    assert f"{model_gib:.2f} GiB" in why
    assert "16.00 GiB" in why


def test_auto_agrees_across_ranks() -> None:
    def body(model_bytes: int) -> tuple[str, str]:
        engine, why = build_engine(AutoEngine(), ranks=cases.ranks_here(), precision="bf16", model_bytes=model_bytes)
        return engine.name, why

    small, large = run_ranks(lambda: body(10**6), 2), run_ranks(lambda: body(10**15), 2)
    assert [name for name, _ in small] == ["ddp", "ddp"]
    assert [name for name, _ in large] == ["fsdp", "fsdp"]
    assert small[0] == small[1]


def test_single_refuses_many_ranks() -> None:
    with pytest.raises(ConfigError, match="engine=ddp"):
        build_engine(SingleEngine(), ranks=ranks_of(2), precision="fp32", model_bytes=0)


@pytest.mark.parametrize(
    ("shard_size", "message"), [(4, r"does not divide the 6 ranks; set one of \[2, 3, 6\]"), (1, "engine=ddp")]
)
def test_impossible_shard_sizes_are_refused(shard_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(FsdpEngine(shard_size=shard_size), ranks=ranks_of(6), precision="fp32", model_bytes=0)


def test_mesh_of_a_hybrid_puts_neighbours_into_one_shard_group() -> None:
    def body() -> tuple[tuple[str, ...], list[int]]:
        engine, _ = build_engine(FsdpEngine(shard_size=2), ranks=cases.ranks_here(), precision="fp32", model_bytes=0)
        return engine.mesh.mesh_dim_names, engine.mesh["shard"].mesh.tolist()

    names, shards = zip(*run_ranks(body, 4), strict=True)
    assert set(names) == {("replicate", "shard")}
    assert list(shards) == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("layouts", "found"),
    [
        (
            [{}, {"ep": 2}],
            r"rank 0: \[1, 1, 1, 1, None, 1, 1, 'ulysses', .*\], rank 1: \[1, 1, 2, 1, None, .*; start",
        ),
        ([{"experts": {"move_every_steps": n}} for n in (3, 4)], "'move_every_steps': 3.*'move_every_steps': 4"),
    ],
)
def test_ranks_of_other_layouts_all_raise_the_same_line(layouts: list[dict[str, Any]], found: str) -> None:
    def body() -> str:
        ranks = cases.ranks_here()
        layout = LayoutConfig(**layouts[ranks.rank])
        with pytest.raises(RunError) as refusal:
            build_engine(DdpEngine(), ranks=ranks, precision="fp32", model_bytes=0, layout=layout)
        return str(refusal.value)

    first, second = run_ranks(body, 2, timeout_seconds=20)
    assert first == second
    assert re.search(found, first)
