"""Weights spread over two ranks, rows unevenly: the same numbers as on one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from leanmill.kernels.fake_quant.activations import quantise_activations
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.kernels.lowrank_delta.op import lowrank_delta, lowrank_delta_linear
from leanmill.kernels.ternary.op import ternary
from tests.distributed import run_ranks


ROWS, COLUMNS, WHOLE = [Shard(0)], [Shard(1)], [Replicate()]


def compare(function, tensors, placements):
    """Outputs and gradients of `function` on distributed tensors against plain ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = [tensor.clone().requires_grad_() for tensor in tensors]
    spread = [
        distribute_tensor(tensor, mesh, placement).requires_grad_()
        for tensor, placement in zip(tensors, placements, strict=True)
    ]
    expected, out = function(*plain), function(*spread)
    assert isinstance(out, DTensor)
    torch.testing.assert_close(out.full_tensor(), expected)
    upstream = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, plain, upstream)
    out = out.redistribute(placements=WHOLE)
    found = torch.autograd.grad(out, spread, DTensor.from_local(upstream, mesh, WHOLE))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.full_tensor(), other)


def check_grids():
    weight = torch.randn(5, 16)
    for shape, placements in (
        ((5, 1), [ROWS, ROWS]),
        ((5, 4), [ROWS, ROWS]),
        ((5, 4), [COLUMNS, COLUMNS]),
        ((5, 1), [COLUMNS, WHOLE]),
        ((1,), [ROWS, WHOLE]),
        ((1, 1), [WHOLE, WHOLE]),
    ):
        scale = torch.rand(shape) + 0.2
        for offset in (None, torch.randn(shape) * 0.1):
            tensors = [weight, scale] if offset is None else [weight, scale, offset]
            places = placements if offset is None else [*placements, placements[1]]
            compare(lambda *t: fake_quant(*t, num_bits=3), tensors, places)


def check_levels():
    for shape in ((5, 16), (3, 5, 8)):
        weight = torch.randn(shape)
        for dim in range(len(shape)):
            for granularity in ("tensor", "row"):
                compare(lambda w, g=granularity: ternary(w, "absmean", g), [weight], [[Shard(dim)]])
                compare(lambda w, g=granularity: ternary(w, "twn", g), [weight], [[Shard(dim)]])
    # The scale is the mean of the whole weight, also where ranks hold different numbers of rows.
    weight = torch.tensor([[1.0], [1.0], [7.0]])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    out = ternary(distribute_tensor(weight, mesh, ROWS)).full_tensor()
    assert torch.equal(out, torch.tensor([[0.0], [0.0], [3.0]]))
    compare(quantise_activations, [torch.randn(5, 8)], [ROWS])
    with pytest.raises(ValueError, match="whole rows"):
        quantise_activations(distribute_tensor(torch.randn(4, 8), mesh, COLUMNS))


def check_low_rank():
    weight, a, b, scale, x = (
        torch.randn(5, 8),
        torch.randn(2, 8),
        torch.randn(5, 2),
        torch.rand(5, 1),
        torch.randn(3, 8),
    )
    placements = [ROWS, WHOLE, ROWS, ROWS]
    compare(lambda w, a, b, s: lowrank_delta(w, a, b, 0.5, scale=s, num_bits=3), [weight, a, b, scale], placements)
    compare(
        lambda w, a, b, s, x: lowrank_delta_linear(x, w, a, b, 0.5, scale=s, num_bits=3),
        [weight, a, b, scale, x],
        [*placements, WHOLE],
    )


def check_messages():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match="both"):
        fake_quant(distribute_tensor(torch.randn(4, 8), mesh, ROWS), torch.ones(1), num_bits=4)


@pytest.mark.parametrize("check", [check_grids, check_levels, check_low_rank, check_messages])
def test_two_ranks(check):
    run_ranks(check, 2)
