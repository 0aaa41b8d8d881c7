"""The ternary stage: gradient, granularity, levels inside models."""

import pytest
import torch

from leanmill.core.sites import iter_sites
from leanmill.kernels.ternary.naive import ternarise
from leanmill.quant.ternary.stage import TernaryStage
from tests.core.tiny import install, tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("scale", ["absmean", "twn", "mse"])
def test_values_and_straight_through_gradient(scale, granularity, shape, dtype):
    weight = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    out = TernaryStage(scale, granularity)(weight)
    out.backward(upstream)
    assert torch.equal(out, ternarise(weight.detach(), scale, (-2, -1) if granularity == "tensor" else (-1,)))
    assert torch.equal(weight.grad, upstream)


def test_each_expert_and_each_row_has_its_own_scale():
    weight = torch.randn(3, 4, 16) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    per_expert = TernaryStage("absmean", "tensor")(weight).abs().amax((-2, -1))
    torch.testing.assert_close(per_expert, weight.abs().mean((-2, -1)))
    per_row = TernaryStage("absmean", "row")(weight).abs().amax(-1)
    torch.testing.assert_close(per_row, weight.abs().mean(-1))


@pytest.mark.parametrize("scale", ["absmean", "twn", "mse"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_levels_inside_a_model(family, scale):
    model = tiny(family)
    install(model, {"type": "ternary", "scale": scale, "exclude": ["o_proj"]})
    names = []
    for name, site in iter_sites(model):
        weight = site.effective_weight().detach()
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            levels = matrix.unique()
            assert levels.numel() == 3, name
            assert torch.equal(levels, -levels.flip(0)), name
        names.append(name)
    assert names
    assert not any("o_proj" in name for name in names)
