"""The staged linear under FSDP2, which frees gathered weights after forward."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from leanmill.kernels.staged_linear.op import staged_linear
from tests.distributed import run_ranks


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8, 1) + 0.5)

    def forward(self, x):
        return staged_linear(x, self.weight, None, lambda w, s: torch.tanh(w / s) * s, self.scale)


def _sharded_gradients(model, x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model(x[dist.get_rank()]).square().mean().backward()
    return [parameter.grad.full_tensor() for parameter in model.parameters()]


def test_gradients_equal_those_of_one_process():
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(2, 4, 8)
    found = run_ranks(_sharded_gradients, 2, copy.deepcopy(model), x)
    (2 * model(x).square().mean()).backward()
    for gradients in found:
        torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])
