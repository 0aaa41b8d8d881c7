"""The head inside an FSDP2 unit whose weights are freed between forward and backward; DTensors themselves."""

import pytest
import torch
from torch import nn

from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy
from leanmill.kernels.linear_kl.op import TeacherHead, linear_kl
from tests.distributed import run_ranks


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 13)

    def forward(self, x, labels, reduction):
        hidden = self.body(x)
        teacher = TeacherHead(x, torch.linspace(-1, 1, 78, dtype=x.dtype).view(13, 6))
        weight, bias = self.head.weight, self.head.bias
        loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, chunk_tokens=3).sum()
        return loss + linear_kl(hidden, weight, bias, teacher=teacher, reduction="sum", chunk_tokens=3)


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(13, (7,), generator=generator)
    labels[rank] = -100
    return torch.randn(7, 6, generator=generator, dtype=torch.float64), labels


def sharded_gradients(reduction, is_root):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    module = Losses().double()
    model = module if is_root else nn.ModuleDict({"unit": module})
    fully_shard(module, reshard_after_forward=True)
    for _ in range(2):
        model.zero_grad()
        module(*batch(dist.get_rank()), reduction).backward()
    return {name: p.grad.full_tensor() for name, p in module.named_parameters()}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("is_root", [True, False])
def test_gradients_reach_a_weight_that_was_freed(reduction, is_root):
    plain = Losses().double()
    for rank in range(2):
        plain(*batch(rank), reduction).backward()
    for found in run_ranks(lambda: sharded_gradients(reduction, is_root), 2):
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad / 2)


def refuses_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(torch.randn(12, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    hidden, labels = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"full_tensor\(\)"):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match=r"full_tensor\(\)"):
        linear_kl(hidden, weight, teacher=TeacherHead(hidden, torch.randn(12, 4)))
    return True


def test_a_sharded_vocabulary_is_refused():
    assert run_ranks(refuses_dtensors, 2) == [True, True]
