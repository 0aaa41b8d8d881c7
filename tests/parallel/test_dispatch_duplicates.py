"""Ranks that hold the same tokens send a slice each: the results and gradients of one rank, fewer bytes."""

import pytest
import torch
import torch.distributed as dist

from leanmill.core.dispatch import ATTRIBUTE, LOCAL, dispatch_of
from leanmill.parallel.dispatch import AllToAllDispatch
from leanmill.parallel.dispatch_duplicates import WithoutDuplicates
from tests.distributed import run_ranks
from tests.parallel.dispatch_cases import (
    NUM_EXPERTS,
    Collectives,
    compare,
    experts_module,
    inputs,
    keep_own_experts,
    together,
)


@pytest.mark.parametrize("num_tokens", [5, 1, 0])
def test_two_ranks_share_out_what_both_hold(num_tokens):
    (one,) = inputs([num_tokens])

    def run():
        module = experts_module()
        setattr(module, ATTRIBUTE, WithoutDuplicates(LOCAL, dist.group.WORLD))
        return one.run(module)

    expected = one.run(experts_module())
    first, second = run_ranks(run, 2)
    for name in ("out", "tokens", "combine weights"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected[name], rtol=0, atol=1e-12)
    for name in ("gate_up_proj", "down_proj"):
        torch.testing.assert_close(first[name] + second[name], expected[name], rtol=0, atol=1e-12)


def experts_over(ranks, num_tensor_ranks):
    """Tensor ranks are neighbours; experts are spread over `ranks`, lists of which all ranks are in one each."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = {tuple(members): dist.new_group(members) for members in ranks}
    tensor = [list(range(first, first + num_tensor_ranks)) for first in range(0, world_size, num_tensor_ranks)]
    tensor_groups = [dist.new_group(members) for members in tensor]
    members = next(members for members in ranks if rank in members)
    module = experts_module()
    keep_own_experts(module, members.index(rank), len(members))
    inner = AllToAllDispatch(groups[tuple(members)], NUM_EXPERTS)
    setattr(module, ATTRIBUTE, WithoutDuplicates(inner, tensor_groups[rank // num_tensor_ranks]))
    return module


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [[0, 1, 2, 3]]], ids=["beside tensor ranks", "over all"])
def test_experts_of_other_ranks_behind_tensor_parallelism(ranks):
    batches = inputs([7, 4])

    def run():
        module = experts_over(ranks, 2)
        with Collectives() as collectives:
            found = batches[dist.get_rank() // 2].run(module)
        with Collectives() as duplicated:
            module.expert_dispatch = dispatch_of(module).dispatch
            batches[dist.get_rank() // 2].run(module)
        ep_rank = next(members.index(dist.get_rank()) for members in ranks if dist.get_rank() in members)
        return found, collectives.bytes_sent(ep_rank), duplicated.bytes_sent(ep_rank)

    results = run_ranks(run, 4)
    expected = together(batches).run(experts_module())
    found = [one for one, *_ in results]
    for name in ("out", "tokens", "combine weights"):
        assert torch.equal(found[0][name], found[1][name])
    if len(ranks) == 1:
        whole = [{name: one[name] for name in ("gate_up_proj", "down_proj")} for one in found]
        compare(whole, {name: expected[name] for name in whole[0]}, 1e-9)
    else:
        for name in ("gate_up_proj", "down_proj"):
            halves = torch.cat([found[0][name] + found[1][name], found[2][name] + found[3][name]])
            torch.testing.assert_close(halves, expected[name], rtol=0, atol=1e-9)
    for name in ("out", "tokens", "combine weights"):
        torch.testing.assert_close(torch.cat([found[0][name], found[2][name]]), expected[name], rtol=0, atol=1e-9)
    sent, duplicated = (sum(one[place] for one in results) for place in (1, 2))
    assert 0.4 * duplicated <= sent <= 0.6 * duplicated
