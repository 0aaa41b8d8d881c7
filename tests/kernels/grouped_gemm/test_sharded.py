"""The grouped product on sorted rows that ranks share out, shards ending inside an expert."""

import pytest
import torch

from leanmill.kernels.grouped_gemm.op import grouped_gemm
from tests.distributed import run_ranks


def on_rows(x, weight, offsets, upstream):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    experts = distribute_tensor(weight, mesh, [Replicate()]).requires_grad_()
    out = grouped_gemm(rows, experts, offsets)
    assert out.placements == (Shard(0),)
    (out * distribute_tensor(upstream, mesh, [Shard(0)])).sum().backward()
    with pytest.raises(ValueError, match="redistribute"):
        grouped_gemm(distribute_tensor(x, mesh, [Shard(1)]), experts, offsets)
    with pytest.raises(ValueError, match="plain and needs a gradient"):
        grouped_gemm(rows, weight.clone().requires_grad_(), offsets)
    with pytest.raises(ValueError, match="moves rows across"):
        grouped_gemm(rows, experts, offsets, gather_index=torch.arange(len(x)).unsqueeze(1))
    return out.full_tensor().detach(), rows.grad.full_tensor(), experts.grad.full_tensor()


@pytest.mark.parametrize("offsets", [[3, 3, 5, 7], [0, 6, 6, 6], [1, 1, 1, 1]])
def test_rows(offsets):
    num_rows = offsets[-1] + (offsets[-1] == 6)  # once with a row of no expert
    x, weight = torch.randn(num_rows, 6, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True)
    upstream, ends = torch.randn(num_rows, 5), torch.tensor(offsets)
    out = grouped_gemm(x, weight, ends)
    (out * upstream).sum().backward()
    for found in run_ranks(on_rows, 2, x.detach(), weight.detach(), ends, upstream):
        torch.testing.assert_close(found, (out.detach(), x.grad, weight.grad))
