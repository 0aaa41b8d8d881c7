"""Predicted step times against sums written out by hand."""

import math
from dataclasses import replace

import pytest

from leanmill.optim.config import AdamW
from leanmill.parallel.config import DdpEngine, DeepSpeedEngine, FsdpEngine
from leanmill.parallel.layout import Layout
from leanmill.plan.layouts.rates import Link, Rates
from leanmill.plan.layouts.step_time import BETWEEN, BUBBLE, INSIDE, MATMULS, OFFLOAD, RECOMPUTE, SMALL, Point, predict
from leanmill.plan.layouts.work import Work


RATES = Rates(
    name="test",
    matmul_flops=1e12,
    half_size=100.0,
    memory=Link(bytes_per_second=1e11),
    inside=Link(bytes_per_second=1e10),
    between=Link(bytes_per_second=1e9),
    overlap=0.0,
    nvme=Link(bytes_per_second=1e9),
)
WORK = Work(
    flops_per_token=6e6,
    num_layers=4,
    hidden=500,
    inner=1000.0,
    projected=1500.0,
    attended=500.0,
    num_heads=10,
    num_groups=10,
    head_dim=50,
    num_experts=0,
    top_k=0,
    num_expert_layers=0,
    dense=800_000,
    experts=0,
    root=200_000,
    trained=1_000_000,
    split=600_000,
    expert_flops_share=0.0,
)


def timed(engine, layout, rates=RATES, per_node=8, **changes):
    options = {"pipeline": 1, "tokens": 1000, "num_micro_batches": 2, "recompute": "none", "kept_bytes": 1e6} | changes
    point = Point(engine=engine, layout=layout, **options)
    return predict(point, WORK, rates, per_node=per_node, precision="bf16", optimizer=AdamW())


def test_matmuls_take_their_work_at_the_rate_and_what_narrow_ones_take_more():
    found = timed(DdpEngine(), Layout(1))
    assert found.parts[MATMULS] == pytest.approx(2 * 1000 * 6e6 / 1e12)
    # Of tokens, hidden and each kind of width: (1 + 100 / d).
    slow = sum(1.1 * 1.2 * (1 + 100 / width) for width in (500, 500, 1000)) / 3
    assert found.parts[SMALL] == pytest.approx((slow - 1) * found.parts[MATMULS])


def test_ddp_reduces_gradients_once_a_step_over_the_link_it_has():
    inside = timed(DdpEngine(), Layout(4))
    assert inside.parts[INSIDE] == pytest.approx(2 * 3 / 4 * 4e6 / 1e10)
    assert inside.parts[BETWEEN] == 0
    # 2 machines of 2: both cards of a machine take part, and a rank's own link inside is faster than those.
    between = timed(DdpEngine(), Layout(4), per_node=2)
    assert between.parts[BETWEEN] == pytest.approx(2 * 3 / 4 * 4e6 / (2 * 1e9))
    assert between.bytes_between == pytest.approx(2 * 3 / 4 * 4e6)


def test_fsdp_gathers_twice_a_micro_batch_and_reduces_in_each():
    gathers, root = 2 * 2 * 800_000 + 2 * 200_000, 0  # bf16: blocks twice, the root once
    expected = 3 / 4 * 2 * (gathers + root + 4 * 1_000_000) / 1e10
    assert timed(FsdpEngine(), Layout(4, dp_shard=4)).parts[INSIDE] == pytest.approx(expected)
    kept = 3 / 4 * (2 * 2 * 1_000_000 + 4 * 1_000_000) / 1e10  # gathered once a micro-batch, reduced once a step
    engine = FsdpEngine(reshard_after_forward=False)
    assert timed(engine, Layout(4, dp_shard=4)).parts[INSIDE] == pytest.approx(kept)


def test_replicas_reduce_shards_once_a_step_between_machines():
    found = timed(FsdpEngine(), Layout(4, dp_shard=2), per_node=2)
    # Each of the two ranks of a machine has a card for its own shard.
    assert found.parts[BETWEEN] == pytest.approx(2 * 1 / 2 * 4 * 1_000_000 / 2 / 1e9)


def test_matmuls_that_ranks_share_send_what_the_guide_counts():
    found = timed(DdpEngine(), Layout(2, tp=2))
    share = 1 / 2 * 1000 * 500 * 2
    # No gradients travel: the ranks are one data rank. Of 4 layers, and outside of them.
    assert found.parts[INSIDE] == pytest.approx(2 * (4 * 14 + 4) * share / 1e10)
    split = timed(DdpEngine(), Layout(2, tp=2, sequence_parallel=True))
    assert split.parts[INSIDE] == pytest.approx(2 * (4 * 10 + 6) * share / 1e10)
    again = timed(DdpEngine(), Layout(2, tp=2), recompute="full")
    assert again.parts[INSIDE] == pytest.approx(2 * (4 * 16 + 4) * share / 1e10)
    assert again.parts[RECOMPUTE] > 0


def test_a_pipeline_waits_for_its_ends():
    free = replace(RATES, inside=Link(bytes_per_second=math.inf))
    alone, piped = (timed(DdpEngine(), Layout(4), free, pipeline=stages) for stages in (1, 4))
    computing = sum(seconds for part, seconds in piped.parts.items() if part not in (BUBBLE, "update"))
    assert piped.parts[BUBBLE] == pytest.approx(3 / 2 * computing)
    assert piped.parts[MATMULS] == pytest.approx(alone.parts[MATMULS] / 4)


def test_computing_hides_what_it_may():
    rates = replace(RATES, overlap=1.0)
    whole, hiding = timed(FsdpEngine(), Layout(4, dp_shard=4)), timed(FsdpEngine(), Layout(4, dp_shard=4), rates)
    assert hiding.hidden_seconds == pytest.approx(whole.parts[INSIDE])
    assert hiding.parts[INSIDE] == pytest.approx(0)
    assert whole.hidden_seconds == 0


def test_offload_moves_gradients_weights_and_state():
    offload = {"device": "nvme", "path": "/nvme"}
    found = timed(DeepSpeedEngine(stage=3, offload_optimizer=offload), Layout(4))
    share = 250_000
    there_and_back = 8 * share / RATES.host.bytes_per_second
    state = 2 * (2 * 4 * share + 4 * share) / 1e9
    assert found.parts[OFFLOAD] == pytest.approx(there_and_back + state)
    assert 0 < found.offload_hideable <= found.parts[OFFLOAD] + found.parts["update"]


def test_a_ring_starts_once_a_member_and_a_tree_once_a_doubling():
    slow = replace(RATES, between=Link(bytes_per_second=math.inf, seconds=1.0), inside=Link(bytes_per_second=math.inf))
    assert timed(DdpEngine(), Layout(16), slow, per_node=4).parts[BETWEEN] == pytest.approx(2 * 2)
    once = timed(
        FsdpEngine(reshard_after_forward=False), Layout(16, dp_shard=16), slow, per_node=4, num_micro_batches=1
    )
    assert once.parts[BETWEEN] == pytest.approx(3 * (4 + 1 + 4))  # 4 layers and the root gathered, 4 layers reduced
