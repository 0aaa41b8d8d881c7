"""The head in an FSDP2 unit whose weights are freed between forward and backward, and tokens sharded as DTensors."""

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


SIZES = ((5,), (1,), (2, 3))
"""Leading dims, of which the last is sharded; some ranks hold no token."""


def operands(leading):
    generator = torch.Generator().manual_seed(sum(leading))

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(12, leading, generator=generator)
    labels.view(-1)[1:2] = -100
    return draw(*leading, 4), draw(12, 4), draw(12), labels, draw(*leading)


def loss_of(hidden, weight, bias, labels, upstream, reduction):
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, z_loss=0.1)
    return loss, ((loss * upstream).sum() if reduction == "none" else 3 * loss)


def on_one(leading, reduction):
    *parameters, labels, upstream = operands(leading)
    loss, scalar = loss_of(*(t.requires_grad_() for t in parameters), labels, upstream, reduction)
    return [loss.detach(), *torch.autograd.grad(scalar, parameters)]


def on_ranks(sizes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", sizes)
    whole = [Replicate()] * len(sizes)
    results = []
    for leading in SIZES:
        rows = [*whole[1:], Shard(len(leading) - 1)]
        for reduction in ("sum", "mean", "none"):
            hidden, weight, bias, labels, upstream = operands(leading)
            hidden, labels, upstream = (distribute_tensor(t, mesh, rows) for t in (hidden, labels, upstream))
            parameters = [hidden.requires_grad_(), distribute_tensor(weight, mesh, whole).requires_grad_()]
            # A sharded one, gathered differentiably.
            parameters.append(distribute_tensor(bias, mesh, [*whole[1:], Shard(0)]).requires_grad_())
            gathered = parameters[2].redistribute(placements=whole)
            loss, scalar = loss_of(*parameters[:2], gathered, labels, upstream, reduction)
            gradients = torch.autograd.grad(scalar, parameters)
            assert list(loss.placements) == (rows if reduction == "none" else whole)
            assert gradients[0].placements == hidden.placements
            assert gradients[2].placements == parameters[2].placements
            frozen = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, z_loss=0.1)
            torch.testing.assert_close(frozen.full_tensor(), loss.full_tensor())
            results.append([t.detach().full_tensor() for t in (loss, *gradients)])
    return results


@pytest.mark.parametrize("sizes", [(2,), (2, 1)], ids=["sharded", "replicated"])
def test_tokens_of_all_ranks_equal_one_process(sizes):
    expected = [on_one(leading, reduction) for leading in SIZES for reduction in ("sum", "mean", "none")]
    for found in run_ranks(on_ranks, 2, sizes):
        torch.testing.assert_close(found, expected)


def traced():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, bias, labels, _ = operands((5,))
    hidden, labels = (distribute_tensor(t, mesh, [Shard(0)]) for t in (hidden, labels))
    parameters = [hidden, *(distribute_tensor(t, mesh, [Replicate()]) for t in (weight, bias))]
    for tensor in parameters:
        tensor.requires_grad_()
    function = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = function(*parameters[:2], labels, parameters[2], z_loss=0.1)
    gradients = torch.autograd.grad(3 * loss, parameters)
    return [t.detach().full_tensor() for t in (loss, *gradients)]


def test_traces_with_sharded_tokens():
    for found in run_ranks(traced, 2):
        torch.testing.assert_close(found, on_one((5,), "mean"))


def refuses_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, labels = torch.randn(3, 4), torch.randn(12, 4), torch.zeros(3, dtype=torch.long)
    rows, sharded = (distribute_tensor(t, mesh, [Shard(0)]) for t in (hidden, weight))
    with pytest.raises(ValueError, match=r"weight.full_tensor\(grad_placements"):
        linear_cross_entropy(hidden, sharded, labels)
    with pytest.raises(ValueError, match=r"weight.full_tensor\(grad_placements"):
        linear_kl(hidden, sharded, teacher=TeacherHead(hidden, torch.randn(12, 4)))
    spread_labels = distribute_tensor(labels, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight.redistribute\(placements=\[Replicate"):
        linear_cross_entropy(rows, sharded, spread_labels)
    with pytest.raises(ValueError, match=r"labels \(3,\) is plain .* distribute_tensor\(labels"):
        linear_cross_entropy(rows, weight, labels)
    with pytest.raises(ValueError, match=r"weight \(12, 4\) is plain and needs a gradient"):
        linear_cross_entropy(rows, weight.requires_grad_(), spread_labels)
    with torch.no_grad():
        linear_cross_entropy(rows, weight, spread_labels)
    with pytest.raises(ValueError, match="does not hold whole rows"):
        linear_cross_entropy(distribute_tensor(hidden, mesh, [Shard(1)]), weight, spread_labels)
    return True


def test_what_is_refused():
    assert run_ranks(refuses_dtensors, 2) == [True, True]
