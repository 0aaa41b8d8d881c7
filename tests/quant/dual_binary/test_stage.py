"""Two binaries against DB-LLM's equations, written out."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import iter_sites
from leanmill.quant.dual_binary.stage import TRIED, DualStage
from leanmill.quant.sharing import Sharing
from tests.core.tiny import install, loss_of, tiny, tokens


def spread(alpha, shape, group_size):
    return alpha.double().repeat_interleave(group_size, -1) if group_size else alpha.double().expand(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 8)])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_values_and_gradients(granularity, shape, dtype):
    torch.manual_seed(0)
    weight, upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight[..., 0, 1] = 0
    weight.requires_grad_()
    group_size = 4 if granularity == "group" else None
    stage = DualStage(weight, Sharing(granularity, group_size))
    with torch.no_grad():
        stage.alpha1.copy_(1.5 + 0.3 * torch.rand_like(stage.alpha1))
        stage.alpha2.copy_(-0.5 - 0.3 * torch.rand_like(stage.alpha2))
    out = stage(weight)
    out.backward(upstream)
    exact = weight.detach().double()
    alphas = [alpha.detach().requires_grad_() for alpha in (stage.alpha1, stage.alpha2)]
    first, second = (spread(alpha, shape, group_size) for alpha in alphas)
    b1 = torch.heaviside(exact - (first + second).detach() / 2, torch.ones((), dtype=torch.float64))
    b2 = torch.heaviside(-(exact - first.detach() * b1 - second.detach() / 2), torch.ones((), dtype=torch.float64))
    kept = exact != 0
    expected = (first * b1 + second * b2) * kept
    torch.testing.assert_close(out.double(), expected.detach(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(weight.grad, upstream)
    expected.backward(upstream.double())
    factor = (weight.numel() / stage.alpha1.numel()) ** -0.5
    for got, alpha in zip((stage.alpha1, stage.alpha2), alphas, strict=True):
        torch.testing.assert_close(got.grad, alpha.grad * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_it_starts_at_the_nearest_of_four_levels(granularity):
    weight = torch.randn(6, 50)
    stage = DualStage(weight, Sharing(granularity))
    stage.initialise(weight)
    dims = (0, 1) if granularity == "tensor" else (1,)
    mean = weight.abs().mean(dims, keepdim=True)

    def error(scale):
        levels = scale.unsqueeze(-1) * torch.tensor([-1.0, 0.0, 1.0, 2.0])
        return (weight.unsqueeze(-1) - levels).abs().amin(-1).square().sum(dims)

    got = (stage(weight) - weight).square().sum(dims)
    torch.testing.assert_close(got, torch.stack([error(mean * multiple) for multiple in TRIED]).amin(0))
    assert torch.equal(stage.alpha1, -2 * stage.alpha2)


def test_parts_of_a_weight_that_shares_its_scales():
    weight = torch.randn(6, 5)
    stage = DualStage(weight, Sharing("tensor"))
    stage.initialise(weight)
    stage(weight).sum().backward()
    whole, stage.alpha1.grad = stage.alpha1.grad, None
    for part in (weight[:4], weight[4:4], weight[4:]):
        staging = stage.on_part(part, weight.shape)
        with pytest.raises(StopIteration) as end:
            next(staging)
        end.value.value.sum().backward()
    torch.testing.assert_close(stage.alpha1.grad, whole)


def test_degenerate_weights():
    for weight in (torch.zeros(2, 4), torch.full((2, 4), 3.0)):
        stage = DualStage(weight, Sharing("row"))
        stage.initialise(weight)
        out = stage(weight)
        assert out.isfinite().all()
        torch.testing.assert_close(out, weight, rtol=0.03, atol=0)
    assert stage(torch.tensor([[torch.nan, 1.0, 2.0, 0.0]] * 2))[:, 0].isnan().all()


def test_inside_models():
    for family in ("llama", "mixtral"):
        model = tiny(family)
        install(model, {"type": "dual_binary", "granularity": "group", "group_size": 8}, {"type": "nm_sparsity"})
        for name, site in iter_sites(model):
            for stage in site.weight_stages():
                stage.initialise(site.raw_weight.detach()) if stage.technique == "dual_binary" else None
            weight = site.effective_weight().detach()
            assert ((weight.reshape(-1, 4) == 0).sum(-1) >= 2).all(), name
        loss_of(model, tokens()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_requests_that_do_not_fit():
    with pytest.raises(ValueError, match="group_size"):
        parse_technique({"type": "dual_binary", "granularity": "group"})
    with pytest.raises(ConfigError, match=r"dual_binary\.exclude"):
        install(tiny(), {"type": "dual_binary", "granularity": "group", "group_size": 20})
