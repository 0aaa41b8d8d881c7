"""The gate on tokens sharded over ranks."""

import pytest
import torch

from leanmill.kernels.swiglu.op import swiglu
from tests.distributed import run_ranks


def on_rows(x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    out = swiglu(rows)
    out.square().sum().backward()
    with pytest.raises(ValueError, match="redistribute"):
        swiglu(distribute_tensor(x, mesh, [Shard(1)]))
    return out.full_tensor().detach(), rows.grad.full_tensor()


@pytest.mark.parametrize("num_tokens", [5, 1])
def test_rows(num_tokens):
    x = torch.randn(num_tokens, 8, requires_grad=True)
    out = swiglu(x)
    out.square().sum().backward()
    for found in run_ranks(on_rows, 2, x.detach()):
        torch.testing.assert_close(found, (out.detach(), x.grad))
