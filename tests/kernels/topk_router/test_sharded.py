"""The router on tokens sharded over ranks: decisions, sums over all tokens and gradients of one process."""

import pytest
import torch

from leanmill.kernels.topk_router.op import topk_router
from tests.distributed import run_ranks


TOKENS = (5, 1, 0)
FORMS = ({"score": "softmax"}, {"score": "sigmoid", "normalise": False, "scaling": 1.5})


def operands(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, 6, generator=generator)
    upstream = torch.randn(num_tokens, 2, generator=generator), torch.randn(6, generator=generator)
    return logits, torch.randn(6, generator=generator), upstream


def loss_of(routed, upstream):
    balance = (routed.counts * routed.mean_probability * upstream[1]).sum()
    return (routed.weights * upstream[0]).sum() + 0.3 * routed.z_loss + balance


def on_one(num_tokens, form):
    logits, bias, upstream = operands(num_tokens)
    routed = topk_router(logits.requires_grad_(), 2, bias=bias, **form)
    return [t.detach() for t in (*routed, *torch.autograd.grad(loss_of(routed, upstream), logits))]


def on_ranks(sizes, kinds):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", sizes)
    rows = [Shard(0) if kind == "shard" else Replicate() for kind in kinds]
    whole = [Replicate()] * len(sizes)
    results = []
    for num_tokens in TOKENS:
        for form in FORMS:
            logits, bias, upstream = operands(num_tokens)
            spread = distribute_tensor(logits, mesh, rows).requires_grad_()
            bias = bias if form["score"] == "softmax" else distribute_tensor(bias, mesh, whole)
            routed = topk_router(spread, 2, bias=bias, **form)
            upstream = (distribute_tensor(upstream[0], mesh, rows), distribute_tensor(upstream[1], mesh, whole))
            (gradient,) = torch.autograd.grad(loss_of(routed, upstream), spread)
            assert list(routed.weights.placements) == list(routed.experts.placements) == rows
            assert all(list(t.placements) == whole for t in routed[2:])
            assert list(gradient.placements) == rows
            results.append([t.detach().full_tensor() for t in (*routed, gradient)])
    return results


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [((2,), ("shard",)), ((2, 1), ("replicate", "shard"))],
    ids=["sharded", "replicated"],
)
def test_equals_one_process(sizes, kinds):
    expected = [on_one(num_tokens, form) for num_tokens in TOKENS for form in FORMS]
    for found in run_ranks(on_ranks, 2, sizes, kinds):
        torch.testing.assert_close(found, expected)


def refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    logits, bias, _ = operands(5)
    sharded_bias = distribute_tensor(bias, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="does not hold whole rows"):
        topk_router(distribute_tensor(logits, mesh, [Shard(1)]), 2)
    with pytest.raises(ValueError, match=r"bias \(6,\) is placed .* bias.redistribute\(placements=\[Replicate"):
        topk_router(distribute_tensor(logits, mesh, [Shard(0)]), 2, bias=sharded_bias)
    with pytest.raises(ValueError, match=r"bias.full_tensor\(\)"):
        topk_router(logits, 2, bias=distribute_tensor(bias, mesh, [Replicate()]))
    return True


def test_what_is_refused():
    assert run_ranks(refusals, 2) == [True, True]
