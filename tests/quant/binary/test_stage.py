"""Binary weights against the papers' formulas, written out; masks before them; what a model makes of them."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites, iter_sites
from leanmill.quant.binary.stage import BinaryStage
from leanmill.quant.sharing import Sharing
from tests.core.tiny import install, loss_of, tiny, tokens


def bitnet(weight, dims, center):
    """Wang et al. 2023, eq. 1 to 3 and 12: sign(W - mean W) times mean |W|."""
    exact = weight.double()
    level = exact.abs().mean(dims, keepdim=True)
    border = exact.mean(dims, keepdim=True) if center else 0.0
    return torch.where(exact >= border, level, -level).expand_as(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 16)])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_values_and_straight_through_gradient(granularity, center, shape, dtype):
    torch.manual_seed(0)
    weight, upstream = (torch.randn(shape) + 0.2).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    group_size = 4 if granularity == "group" else None
    out = BinaryStage(Sharing(granularity, group_size), center=center)(weight)
    out.backward(upstream)
    dims = (-2, -1) if granularity == "tensor" else (-1,)
    groups = weight.detach().unflatten(-1, (-1, group_size)) if group_size else weight.detach()
    expected = bitnet(groups, dims, center).reshape(shape)
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(weight.grad, upstream)


def test_a_whole_layer_is_bitnets():
    model = nn.Sequential(nn.Linear(12, 5, dtype=torch.float64))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    parse_technique({"type": "binary", "activation_bits": 8, "input_norm": True}).install(Sites(model), None)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    out = model(x)
    out.backward(upstream)
    normed = x.detach().requires_grad_()
    rows = normed * (normed.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    step = rows.abs().amax(-1, keepdim=True) / 127
    rounded = rows + ((rows / step).round() * step - rows).detach()
    expected = rounded @ bitnet(weight, (0, 1), True).T + bias
    expected.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, normed.grad)
    torch.testing.assert_close(model[0].weight.grad, upstream.flatten(0, 1).T @ rounded.detach().flatten(0, 1))


def test_what_a_mask_pruned_stays_zero_and_counts_nowhere():
    weight = torch.tensor([[0.0, 1.0, -2.0, 0.0], [0.5, 0.0, 0.0, 4.5]], requires_grad=True)
    out = BinaryStage(Sharing("row"), center=True)(weight)
    assert out.tolist() == [[0.0, 1.5, -1.5, 0.0], [-2.5, 0.0, 0.0, 2.5]]
    out.sum().backward()
    assert (weight.grad == 1).all(), "what is pruned must keep its gradient"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_levels_inside_a_model(family):
    model = tiny(family)
    install(model, {"type": "binary"}, {"type": "nm_sparsity"})
    for name, site in iter_sites(model):
        weight = site.effective_weight().detach()
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            assert matrix.abs().unique().numel() == 2, name
            assert (matrix == 0).float().mean() == 0.5, name
    loss_of(model, tokens()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_degenerate_weights():
    stage = BinaryStage(Sharing("row"), center=True)
    assert not stage(torch.zeros(2, 4)).any(), "rows of zeros stay zeros"
    assert stage(torch.full((2, 4), 3.0)).tolist() == [[3.0] * 4] * 2, "a constant row is its own level"
    assert stage(torch.tensor([[torch.nan, 1.0], [1.0, 2.0]])).isnan().tolist() == [[True, True], [False, False]]


def test_requests_that_do_not_fit():
    with pytest.raises(ValueError, match="group_size"):
        parse_technique({"type": "binary", "granularity": "group"})
    with pytest.raises(ConfigError, match=r"binary\.exclude"):
        install(tiny(), {"type": "binary", "granularity": "group", "group_size": 20})
    with pytest.raises(ConfigError, match="QUANT slot"):
        install(tiny(), {"type": "binary"}, {"type": "ternary"})
