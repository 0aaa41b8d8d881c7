"""LSQ against its paper's equations, and its start from loaded weights."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites, iter_sites
from leanmill.models.materialise import initialise_stages
from leanmill.trainer.prepare import undecayed
from tests.core.tiny import install, tiny


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_value_and_gradients_are_the_papers(num_bits, granularity):
    model = nn.Sequential(nn.Linear(12, 5, bias=False, dtype=torch.float64))
    group = {"group_size": 4} if granularity == "group" else {}
    raw = {"type": "lsq", "weight_bits": num_bits, "granularity": granularity, **group}
    parse_technique(raw).install(Sites(model), None)
    site, weight = model[0], model[0].weight.detach().clone()
    step = site.stages["quant"].scale
    num_low, num_high = 2 ** (num_bits - 1), 2 ** (num_bits - 1) - 1
    with torch.no_grad():
        step.uniform_(0.02, 0.1)
    s = step.detach().double()
    s = s if granularity != "group" else s.repeat_interleave(4, 1)
    x, upstream = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    site(x).backward(upstream)
    v = weight / s
    grad = upstream.T @ x
    inside = (v >= -num_low) & (v <= num_high)
    codes = v.clamp(-num_low, num_high).round()
    to_step = torch.where(inside, codes - v, torch.where(v < 0, -float(num_low), float(num_high))) * grad
    sharing = {"tensor": 60, "row": 12, "group": 4}[granularity]
    g = 1 / (sharing * max(num_high, 1)) ** 0.5
    summed = {"tensor": lambda t: t.sum().reshape(1), "row": lambda t: t.sum(1, keepdim=True)}
    summed["group"] = lambda t: t.reshape(5, 3, 4).sum(-1)
    torch.testing.assert_close(site.effective_weight().detach(), codes * s)
    torch.testing.assert_close(site.weight.grad, grad * inside)
    torch.testing.assert_close(step.grad.double(), summed[granularity](to_step) * g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_steps_start_from_the_weight_that_arrives(granularity, family):
    model = tiny(family)
    install(model, {"type": "lsq", "granularity": granularity}, {"type": "nm_sparsity"})
    initialise_stages(model)
    assert len(list(iter_sites(model))) > 10
    for _, site in iter_sites(model):
        masked = site.stages["mask"](site.raw_weight.detach())
        dims = (-2, -1) if granularity == "tensor" else (-1,)
        expected = 2 * masked.abs().mean(dims, keepdim=True) / 7**0.5
        got = site.stages["quant"].scale.detach()
        torch.testing.assert_close(got.flatten(), expected.flatten())


def test_steps_get_no_weight_decay_and_train():
    model = tiny()
    install(model, {"type": "lsq", "granularity": "group", "group_size": 8})
    scales = {id(p) for n, p in model.named_parameters() if n.endswith("scale")}
    assert undecayed(model) == scales
    assert all(p.requires_grad for p in model.parameters())


def test_requests_that_do_not_fit():
    with pytest.raises(ValueError, match="grid: midrise"):
        parse_technique({"type": "lsq", "weight_bits": 1})
    with pytest.raises(ValueError, match="group_size"):
        parse_technique({"type": "lsq", "granularity": "group"})
    with pytest.raises(ConfigError, match=r"lsq\.exclude"):
        install(tiny(), {"type": "lsq", "granularity": "group", "group_size": 20})
