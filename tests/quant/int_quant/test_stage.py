"""Integer grids against their formulas, written out."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites
from leanmill.quant.int_quant.stage import IntWeights
from leanmill.quant.scales import SHARES
from tests.core.tiny import install, loss_of, tiny, tokens


def quantised(values, scale, num_bits):
    largest = 2 ** (num_bits - 1) - 1
    return torch.round(values / scale).clamp(-largest, largest) * scale


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (2, 8), (8, 2), (3, None)])
def test_forward_and_straight_through_gradients(weight_bits, activation_bits, granularity):
    model = nn.Sequential(nn.Linear(12, 5, dtype=torch.float64))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    group = {"group_size": 4} if granularity == "group" else {}
    raw = {"type": "int_quant", "weight_bits": weight_bits, "activation_bits": activation_bits}
    parse_technique({**raw, "granularity": granularity, **group}).install(Sites(model), None)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    largest = 2 ** (weight_bits - 1) - 1
    amax = {
        "tensor": weight.abs().max(),
        "row": weight.abs().amax(1, keepdim=True),
        "group": weight.abs().reshape(5, 3, 4).amax(-1).repeat_interleave(4, 1),
    }[granularity]
    w_q, x_q = quantised(weight, amax / largest, weight_bits), x.detach()
    if activation_bits is not None:
        scale = x_q.abs().amax(-1, keepdim=True) / (2 ** (activation_bits - 1) - 1)
        x_q = quantised(x_q, scale, activation_bits)
    out = model(x)
    out.backward(upstream)
    torch.testing.assert_close(out.detach(), x_q @ w_q.T + bias)
    torch.testing.assert_close(x.grad, upstream @ w_q)
    torch.testing.assert_close(model[0].weight.grad, upstream.flatten(0, 1).T @ x_q.flatten(0, 1))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_mse_takes_the_share_with_the_least_error(granularity):
    weight = torch.randn(6, 40)
    weight[:, 0] *= 8  # outliers, so that the largest magnitude is a bad scale
    got = IntWeights(3, "mse", granularity)(weight)
    dims = (0, 1) if granularity == "tensor" else (1,)
    amax = weight.abs().amax(dims, keepdim=True) / 3
    errors = torch.stack([(quantised(weight, amax * s, 3) - weight).square().sum(dims) for s in SHARES])
    torch.testing.assert_close((got - weight).square().sum(dims), errors.min(0).values)
    plain = (IntWeights(3, "absmax", granularity)(weight) - weight).square().sum()
    assert (got - weight).square().sum() < 0.8 * plain


def test_experts_have_scales_of_their_own():
    weight = torch.randn(3, 4, 8) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    got = IntWeights(8, "absmax", "tensor")(weight)
    torch.testing.assert_close(got, weight, rtol=0, atol=float("inf"))
    for expert in range(3):
        error = (got[expert] - weight[expert]).abs().max()
        assert error <= weight[expert].abs().max() / 127 / 2 * 1.001
    plain, model, ids = tiny("mixtral"), tiny("mixtral"), tokens()
    install(model, {"type": "int_quant", "weight_bits": 8, "activation_bits": 8, "targets": ["experts.*"]})
    loss_of(model, ids).backward()
    loss_of(plain, ids).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert 0 < (p.grad - q.grad).norm() / p.grad.norm() < 0.1, name


def test_requests_that_do_not_fit():
    with pytest.raises(ValueError, match="group_size"):
        parse_technique({"type": "int_quant", "group_size": 4})
    with pytest.raises(ConfigError, match=r"int_quant\.exclude"):
        install(tiny(), {"type": "int_quant", "granularity": "group", "group_size": 20})
    with pytest.raises(ConfigError, match="looks rows up"):
        install(tiny(), {"type": "int_quant", "activation_bits": 8, "targets": ["embed_tokens"]})
