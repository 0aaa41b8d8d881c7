"""The transforms on DTensors: every rank transforms the rows it holds."""

import pytest
import torch

from leanmill.kernels.hadamard.op import hadamard, hadamard_, quest_quantise
from tests.distributed import run_ranks


def _on_rows(x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    quest_quantise(rows, 4).to_local().sum().backward()
    in_place = hadamard_(distribute_tensor(x.clone(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="redistribute"):
        hadamard(distribute_tensor(x, mesh, [Shard(1)]))
    return hadamard(rows).full_tensor().detach(), in_place.full_tensor(), rows.grad.full_tensor()


def test_rows():
    x = torch.randn(5, 32, requires_grad=True)
    quest_quantise(x, 4).sum().backward()
    for found in run_ranks(_on_rows, 2, x.detach()):
        torch.testing.assert_close(found, (hadamard(x).detach(), hadamard(x).detach(), x.grad))
