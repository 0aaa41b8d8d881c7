"""PERP against its definition: W + s (B A) where W is not zero, and only the chosen parts train."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites, iter_sites
from leanmill.models.materialise import initialise_stages
from tests.core.tiny import install, loss_of, tiny, tokens


LORA = {"type": "lora", "rank": 3, "alpha": 6}


def pruned(*shape, dtype=torch.float32):
    weight = torch.randn(*shape, dtype=dtype)
    return weight * (torch.rand(shape) > 0.6)


def installed(model, *raw):
    install(model, *raw)
    initialise_stages(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(8, 12), (7, 5)])
def test_mask_lora_is_the_papers(shape, dtype):
    num_out, num_in = shape
    model = nn.Sequential(nn.Linear(num_in, num_out, dtype=dtype))
    model[0].weight.data = pruned(num_out, num_in, dtype=dtype)
    sites = Sites(model)
    for raw in (LORA, {"type": "static_mask"}):
        parse_technique(raw).install(sites, None)
    initialise_stages(model)
    site = next(site for _, site in iter_sites(model))
    delta, mask = site.weight_stages()
    delta.lora_B.data.normal_()
    a, b = (parameter.detach().clone().requires_grad_() for parameter in (delta.lora_A, delta.lora_B))
    weight, scaling = site.weight.detach(), 6 / 3
    x = torch.randn(4, num_in, dtype=dtype)
    merged = (weight.to(a.dtype) + scaling * (b @ a) * (weight != 0)).to(dtype)
    expected = F.linear(x, merged, site.bias)
    found = model(x)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    expected.backward(upstream)
    model.zero_grad()
    found.backward(upstream)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(delta.lora_A.grad, a.grad, **tolerance)
    torch.testing.assert_close(delta.lora_B.grad, b.grad, **tolerance)
    assert mask.kept.grad is None
    assert torch.equal(site.effective_weight() == 0, weight == 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_only_the_chosen_parts_have_gradients_and_the_rest_rests(family):
    model = tiny(family, attention_bias=True) if family != "mixtral" else tiny(family)
    installed(model, {"type": "perp"})
    loss_of(model, tokens()).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {
        n for n, p in model.named_parameters() if p.dim() == 1 and p.is_floating_point() and ".stages." not in n
    }
    assert with_gradient == expected
    assert any("q_norm" in name for name in expected) is (family == "qwen3")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == expected


def test_head_and_embeddings_train_where_listed():
    model = tiny()
    installed(model, {"type": "perp", "train": ["head", "embeddings"], "mask": False})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not list(iter_sites(model))


def test_both_of_tied_weights_or_none():
    with pytest.raises(ConfigError, match="head and embeddings are tied .*; list both"):
        installed(tiny(tie_word_embeddings=True), {"type": "perp", "train": ["head"]})
    model = tiny(tie_word_embeddings=True)
    installed(model, {"type": "perp", "train": ["head", "embeddings"]})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_a_part_that_is_not_there_is_refused():
    model = tiny("llama", attention_bias=False)
    with pytest.raises(ConfigError, match="perp.train: this model has no biases; it has norms, head, embeddings"):
        installed(model, {"type": "perp", "train": ["norms", "biases"]})


def test_with_adapters_whatever_the_order():
    model = tiny(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data = pruned(*parameter.shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    installed(model, LORA, {"type": "perp"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss_of(model, tokens()).backward()
        optimizer.step()
    for name, site in iter_sites(model):
        weight, raw = site.effective_weight(), before[f"{name}.weight"]
        assert torch.equal(site.weight, raw)
        assert torch.equal(weight == 0, raw == 0)
        assert not torch.equal(weight, raw)


def test_static_training_leaves_zeros_also_under_momentum_and_decay():
    model = nn.Sequential(nn.Linear(12, 8))
    model[0].weight.data = pruned(8, 12)
    zeros = model[0].weight == 0
    parse_technique({"type": "static_mask"}).install(Sites(model), None)
    initialise_stages(model)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        model(torch.randn(6, 12)).square().mean().backward()
        assert torch.equal(model[0].weight.grad[zeros], torch.zeros(int(zeros.sum())))
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight == 0, zeros)
    assert (model[0].stages["mask"].kept != zeros).all()


def test_an_infinity_beside_a_pruned_weight_stays_outside():
    from leanmill.sparse.zeros import ZeroMask

    class Stage(ZeroMask):
        technique = "test"

    stage = Stage(torch.empty(2, 2))
    stage.initialise(torch.tensor([[0.0, 1.0], [2.0, -0.0]]))
    found = stage(torch.full((2, 2), float("inf")))
    assert found.tolist() == [[0.0, float("inf")], [float("inf"), 0.0]]
