"""BDWP against its definition: one mask a matmul, a dense straight-through weight gradient."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites, iter_sites
from tests.core.tiny import install, loss_of, tiny, tokens


def kept(weight, num_kept, group_size):
    """Zero all but the largest of every group along the last dim; no ties in random weights."""
    groups = weight.reshape(*weight.shape[:-1], -1, group_size)
    smallest_kept = groups.abs().topk(num_kept, dim=-1).values[..., -1:]
    return torch.where(groups.abs() >= smallest_kept, groups, 0).reshape(weight.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_kept", "group_size"), [(2, 8), (1, 4), (3, 4)])
def test_forward_and_gradients(num_kept, group_size, bias):
    model = nn.Sequential(nn.Linear(16, 8, bias=bias, dtype=torch.float64))
    weight = model[0].weight.detach().clone()
    parse_technique({"type": "bdwp", "num_kept": num_kept, "group_size": group_size}).install(Sites(model), None)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 8, dtype=torch.float64)
    out = model(x)
    out.backward(upstream)
    expected = x.detach() @ kept(weight, num_kept, group_size).T + (model[0].bias.detach() if bias else 0)
    torch.testing.assert_close(out.detach(), expected)
    torch.testing.assert_close(x.grad, upstream @ kept(weight.T, num_kept, group_size).T)
    torch.testing.assert_close(model[0].weight.grad, upstream.flatten(0, 1).T @ x.detach().flatten(0, 1))
    if bias:
        torch.testing.assert_close(model[0].bias.grad, upstream.sum((0, 1)))


def test_a_quantiser_after_it_rounds_both_weights():
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    for raw in ({"type": "bdwp"}, {"type": "ternary"}):
        parse_technique(raw).install(Sites(model), None)
    operands = model[0].operands()
    bound = operands.bound(operands.tensors)
    for weight in (bound.weight(), bound.backward_weight()):
        assert weight.unique().numel() == 3
    assert not torch.equal(bound.weight(), bound.backward_weight())


def test_experts_and_their_routing_weights():
    """With masks that keep (nearly) everything the gradients are those of the plain model."""
    plain, model, ids = tiny("mixtral"), tiny("mixtral"), tokens()
    install(model, {"type": "bdwp", "num_kept": 15, "group_size": 16, "targets": ["experts.*"]})
    loss_of(plain, ids).backward()
    loss_of(model, ids).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        relative = (p.grad - q.grad).norm() / p.grad.norm()
        assert relative < 0.1, name
    assert len(list(iter_sites(model))) == 4


def test_dims_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"group_size 64 does not divide both dims.*bdwp\.exclude"):
        install(tiny(), {"type": "bdwp", "group_size": 64})
    with pytest.raises(ValueError, match="prunes nothing"):
        parse_technique({"type": "bdwp", "num_kept": 8, "group_size": 8})
