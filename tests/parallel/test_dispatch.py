"""Experts spread over ranks: outputs and all gradients are those of one rank; what does not fit raises on all."""

import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from leanmill.core.errors import ConfigError, RunError
from leanmill.parallel.dispatch import AllToAllDispatch
from leanmill.parallel.exchange import _Trip
from tests.distributed import run_ranks
from tests.parallel.dispatch_cases import (
    HIDDEN,
    NUM_EXPERTS,
    TOP_K,
    Collectives,
    Inputs,
    compare,
    experts_module,
    inputs,
    spread_module,
    together,
)


BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def spread(ranks, dtype=torch.float64, **options):
    """What each rank finds."""
    return run_ranks(lambda: ranks[dist.get_rank()].run(spread_module(dtype, **options)), len(ranks))


def check_parity(num_tokens, dtype, num_chunks):
    ranks = inputs(num_tokens, dtype)
    compare(spread(ranks, dtype, num_chunks=num_chunks), together(ranks).run(experts_module(dtype)), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("num_tokens", "num_chunks"), [([5, 7], 1), ([0, 6], 3), ([7, 2], 3)])
def test_outputs_and_gradients_on_two_ranks(dtype, num_tokens, num_chunks):
    check_parity(num_tokens, dtype, num_chunks)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("num_tokens", "num_chunks"), [([3, 0, 9, 1], 1), ([40, 33, 0, 17], 4), ([0, 0, 0, 5], 2)])
def test_outputs_and_gradients_on_four_ranks(dtype, num_tokens, num_chunks):
    check_parity(num_tokens, dtype, num_chunks)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_all_tokens_to_one_rank_and_experts_without_tokens(num_chunks):
    """Experts that get nothing have gradients of zero."""
    ranks = inputs([6, 4], drop=0.0)
    for one in ranks:
        one.index %= 3  # all on rank 0, whose fourth expert gets none
    found = spread(ranks, num_chunks=num_chunks)
    compare(found, together(ranks).run(experts_module()), 1e-9)
    assert (found[0]["gate_up_proj"][3] == 0).all()
    assert all((found[1][name] == 0).all() for name in ("gate_up_proj", "down_proj"))


def test_no_tokens_anywhere_and_nothing_but_dropped_copies():
    for num_tokens, drop in (([0, 0], 0.0), ([3, 2], 2.0)):
        found = spread(inputs(num_tokens, drop=drop))
        for one in found:
            assert all(tensor is not None and (tensor == 0).all() for tensor in one.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(dtype):
    """Rows travel once a rank, dropped copies not at all: docs/kernels/experts.md."""
    ranks = inputs([90, 70], dtype)

    def sent():
        rank = dist.get_rank()
        module = spread_module(dtype)
        with Collectives() as collectives:
            ranks[rank].run(module)
        return collectives.bytes_sent(rank)

    found = run_ranks(sent, 2)
    pairs = [[int((one.index // 4 == other).any(1).sum()) for other in range(2)] for one in ranks]
    size = dtype.itemsize
    for rank, total in enumerate(found):
        out, back = pairs[rank][1 - rank], pairs[1 - rank][rank]
        # Tokens and their gradient's way back, results and theirs; weights and index, the weights' gradient.
        expected = 2 * size * HIDDEN * (out + back) + 8 * TOP_K * out + 4 * TOP_K * back
        assert abs(total - expected) <= 0.02 * expected


def test_the_next_chunk_travels_while_one_is_computed():
    """In forward and in backward, in one order on all ranks."""
    ranks = inputs([9, 4])

    def run():
        one, sent = ranks[dist.get_rank()], Collectives()

        def note(what):
            sent.found.append((what, None, None))

        def wait(trip, end=_Trip.end):
            note("wait")
            return end(trip)

        def compute(tokens, index, weights, **_):
            note("compute")
            out = tokens * weights.sum(1, keepdim=True)
            out.register_hook(lambda grad: note("backward"))
            return out

        dispatch = AllToAllDispatch(dist.group.WORLD, NUM_EXPERTS, num_chunks=3)
        tokens, weights = (t.clone().requires_grad_() for t in (one.tokens, one.weights))
        with sent, patch.object(_Trip, "end", wait):
            dispatch(compute, tokens, one.index, weights).backward(one.upstream)
        return ["travel" if name == "all_to_all_single" else name for name in sent.names()]

    first, second = run_ranks(run, 2)
    assert first == second
    send, arrive, back, home = ["travel"] * 2, ["wait"] * 2, ["travel"], ["wait"]
    compute = [*arrive, "compute", *back]
    forward = [*send, *send, *compute, *send, *compute, *compute, *home * 3]
    # The last chunk was sent when the first was computed, and so its gradients have until then to come home.
    backward = [*back * 3, *[*home, "backward", *send] * 2, *arrive, *home, "backward", *send, *arrive * 2]
    assert first == ["all_gather_into_tensor", *forward, *backward]


def disagreeing(change):
    """The message of each rank when rank 1's inputs are changed."""

    def attempt():
        (mine,) = inputs([4])
        module = spread_module()
        if dist.get_rank() == 1:
            mine = change(mine, module) or mine
        try:
            mine.run(module)
        except RunError as error:
            return str(error)
        return "nothing was raised"

    return run_ranks(attempt, 2, timeout_seconds=20)


def other_index(expert):
    def change(mine, module):
        mine.index[0, 0] = expert

    return change


def other_dtype(mine, module):
    return Inputs(mine.tokens.float(), mine.index, mine.weights, mine.upstream.float())


def other_experts(mine, module):
    module.expert_dispatch.num_experts = 16


def other_chunks(mine, module):
    module.expert_dispatch.num_chunks = 3


def other_top_k(mine, module):
    return Inputs(mine.tokens, mine.index[:, :2], mine.weights[:, :2], mine.upstream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_dtype, r"tokens' dtype \(rank 0: torch.float64, rank 1: torch.float32\)"),
        (other_experts, r"num_experts \(rank 0: 8, rank 1: 16\)"),
        (other_top_k, r"top_k \(rank 0: 3, rank 1: 2\)"),
        (other_chunks, r"layout.expert_chunks \(rank 0: 1, rank 1: 3\), so no tokens were exchanged"),
        (other_index(9), "rank 1 routes to expert 9 of 8"),
        (other_index(-1), "rank 1 routes to expert -1 of 8"),
    ],
    ids=["dtype", "experts", "top_k", "chunks", "too high", "negative"],
)
def test_ranks_that_disagree_all_raise_the_same_line(change, message):
    first, second = disagreeing(change)
    assert first == second
    assert re.search(message, first)


def test_experts_that_do_not_divide_are_refused():
    def attempt():
        for num_experts, num_chunks in ((7, 1), (8, 0)):
            with pytest.raises(ConfigError, match="7 experts|num_chunks is 0"):
                AllToAllDispatch(dist.group.WORLD, num_experts, num_chunks=num_chunks)

    run_ranks(attempt, 2)


def test_one_rank_is_the_local_dispatch_bitwise():
    (one,) = inputs([9], torch.float32)
    (found,) = spread([one], torch.float32)
    for name, tensor in one.run(experts_module(torch.float32)).items():
        assert torch.equal(found[name], tensor), name
