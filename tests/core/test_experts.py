"""Expert compute through sites against transformers' own, on every family with stacked experts."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.experts import experts_forward
from leanmill.core.product import grouped
from leanmill.core.site import ExpertSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Slot, Stage
from tests.core.tiny import MIXTURES, install, loss_of, tiny, tokens


class Same(Stage):
    """Changes nothing, but makes the site take its staged path."""

    slot, technique = Slot.QUANT, "same"

    def forward(self, weight):
        return weight * 1.0


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_output_and_gradients_equal_the_eager_experts(family, staged):
    plain, model, ids = tiny(family, experts_implementation="eager"), tiny(family), tokens(3, 11)
    plain.config._experts_implementation = "eager"
    for site in Sites(model).select(["experts.*"]):
        assert isinstance(site, ExpertSite)
        if staged:
            site.put(Same())
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)
    loss_of(model, ids).backward()
    loss_of(plain, ids).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_autocast_is_close_and_finite(family):
    plain, model, ids = tiny(family), tiny(family), tokens(3, 11)
    plain.config._experts_implementation = "eager"
    install(model, {"type": "lora", "rank": 2})
    expected = plain(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids).logits
        loss_of(model, ids).backward()
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("num_in", "num_out"), [(8, 12), (5, 7), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_product_with_empty_experts_and_odd_sizes(num_in, num_out, dtype):
    counts = [0, 3, 0, 4, 1]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    rows = torch.randn(sum(counts), num_in).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), num_out, num_in).to(dtype).requires_grad_()
    out = grouped(rows, weight, None, ends)
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    twin, twin_weight = rows.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    expected = torch.einsum("ni,noi->no", twin, twin_weight[experts])
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, expected, **tolerance)
    upstream = torch.randn(out.shape).to(dtype)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(rows.grad, twin.grad, **tolerance)
    torch.testing.assert_close(weight.grad, twin_weight.grad, **tolerance)
    assert (weight.grad[[0, 2]] == 0).all()


def test_one_weight_alone_may_be_staged():
    model, ids = tiny("mixtral"), tokens()
    plain = model(ids).logits
    install(model, {"type": "nm_sparsity", "targets": ["experts.down_proj"]})
    assert len(list(iter_sites(model))) == 2
    assert not torch.equal(model(ids).logits, plain)


def test_sites_hang_below_their_module_under_plain_keys():
    model = tiny("qwen3_moe")
    keys = list(model.state_dict())
    install(model, {"type": "ternary"})
    assert list(model.state_dict()) == keys
    experts = model.model.layers[0].mlp.experts
    assert set(experts.sites) == {"gate_up_proj", "down_proj"}
    assert experts.sites["down_proj"].raw_weight is experts.down_proj


@pytest.mark.parametrize("attribute", ["is_transposed", "has_bias", "has_post_expert_norm"])
def test_layouts_that_are_not_covered_are_refused(attribute):
    model = tiny("mixtral")
    setattr(model.model.layers[0].mlp.experts, attribute, True)
    with pytest.raises(ConfigError, match="exclude"):
        Sites(model).select()


def test_copies_that_no_expert_takes_add_nothing():
    """Expert parallelism marks copies of other ranks' experts with the number of experts."""
    model = tiny("qwen3_moe")
    Sites(model).select(["experts.*"])
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, model.config.hidden_size, requires_grad=True)
    index = torch.randint(experts.num_experts, (5, 2))
    weights = torch.rand(5, 2)
    marked = index.clone()
    marked[1, 0] = marked[3] = experts.num_experts
    out = experts_forward(experts, x, marked, weights)
    silenced = weights.masked_fill(marked == experts.num_experts, 0.0)
    torch.testing.assert_close(out, experts_forward(experts, x, index, silenced))
    assert (out[3] == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad[3] == 0).all()
    assert torch.isfinite(grad).all()
