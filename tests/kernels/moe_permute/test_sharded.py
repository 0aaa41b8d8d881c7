"""Tokens sorted by expert cross ranks, so DTensors are refused with what to do instead."""

import pytest
import torch

from leanmill.kernels.grouped_gemm.op import grouped_gemm
from leanmill.kernels.moe_permute.op import moe_permute, moe_unpermute
from tests.distributed import run_ranks


def refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    index, x, weight = torch.tensor([[0], [1]]), torch.randn(2, 4), torch.randn(2, 3, 4)
    rows, experts = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, weight))
    with pytest.raises(ValueError, match=r"past the ends of a shard.*x.to_local\(\)"):
        moe_permute(rows, index, 2)
    with pytest.raises(ValueError, match=r"rows.to_local\(\)"):
        moe_unpermute(rows, index)
    with pytest.raises(ValueError, match=r"weight is a DTensor.*weight.full_tensor\(grad_placements"):
        grouped_gemm(x, experts, torch.tensor([1, 2]))
    return True


def test_dtensors_are_refused():
    assert run_ranks(refusals, 1) == [True]
