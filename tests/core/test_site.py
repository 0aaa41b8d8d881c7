"""Sites: same keys, same numbers, little memory, one tenant a slot."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.operands import recomputed
from leanmill.core.site import EmbeddingSite, LinearSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Slot, Stage
from tests.core.tiny import install, loss_of, tiny, tokens


class Times(Stage):
    """A stage whose effect is easy to write down."""

    technique: ClassVar[str] = "times"

    def __init__(self, slot=Slot.QUANT, factor=2.0, offset=0.0):
        super().__init__()
        self.__dict__["slot"] = slot
        self.factor, self.offset = factor, offset

    def forward(self, weight):
        return weight * self.factor + self.offset


RECIPES = {
    "nm_sparsity": {"type": "nm_sparsity", "decay": 0.1},
    "ternary": {"type": "ternary"},
    "ternary_mse_row": {"type": "ternary", "scale": "mse", "granularity": "row"},
    "lora": {"type": "lora", "rank": 2},
}


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_site_without_stages_is_the_linear_layer(bias):
    plain = nn.Linear(6, 5, bias=bias)
    x = torch.randn(2, 3, 6)
    expected = plain(x)
    site = LinearSite.adopt(plain, "a.b")
    assert isinstance(site, nn.Linear)
    assert site.weight is plain.weight
    assert list(site.state_dict()) == list(plain.state_dict())
    assert torch.equal(site(x), expected)
    assert "stages" in site._modules


@pytest.mark.parametrize("bias", [False, True])
def test_a_staged_linear_computes_and_differentiates_the_staged_weight(bias):
    plain = nn.Linear(6, 5, bias=bias).double()
    site = LinearSite.adopt(copy.deepcopy(plain), "a")
    site.put(Times(factor=3.0, offset=0.5))
    x, y = (torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).requires_grad_() for _ in range(2))
    got = site(x)
    expected = F.linear(y, plain.weight * 3 + 0.5, plain.bias)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours, theirs in zip(site.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_staged_embedding_computes_and_differentiates_the_staged_table():
    plain = nn.Embedding(7, 4, padding_idx=2).double()
    site = EmbeddingSite.adopt(copy.deepcopy(plain), "e")
    site.put(Times(factor=3.0))
    ids = torch.tensor([[0, 2, 6], [6, 6, 1]])
    got, expected = site(ids), F.embedding(ids, plain.weight * 3, 2)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(site.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("change", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_embeddings_that_stages_would_break_are_refused(change):
    with pytest.raises(ConfigError, match="exclude"):
        EmbeddingSite.adopt(nn.Embedding(4, 4, **change), "e")


def test_stages_run_in_slot_order_whatever_the_order_of_putting():
    expected = None
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        site = LinearSite.adopt(nn.Linear(2, 2, bias=False), "a")
        nn.init.ones_(site.weight)
        for i in order:
            site.put(Times(Slot(i), factor=i + 2.0, offset=i + 1.0))
        expected = ((1 * 2 + 1) * 3 + 2) * 4 + 3
        assert (site.effective_weight() == expected).all()
        assert [site.stage(Slot(i)).factor for i in range(3)] == [2.0, 3.0, 4.0]


def test_a_second_tenant_of_a_slot_is_refused_naming_both():
    model = tiny()
    install(model, {"type": "ternary", "targets": ["q_proj"]})
    sites = Sites(model).select(["q_proj", "k_proj"])
    assert sum(site.stage(Slot.QUANT) is None for site in sites) == 2
    with pytest.raises(ConfigError, match=r"q_proj.*QUANT.*'ternary'.*'times'"):
        sites[0].put(Times())
    with pytest.raises(ConfigError, match=r"'ternary'.*'ternary'"):
        install(tiny(), {"type": "ternary"}, {"type": "ternary", "scale": "twn"})
    install(tiny(), {"type": "ternary", "targets": ["q_proj"]}, {"type": "ternary", "targets": ["k_proj"]})


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_little_is_kept_between_forward_and_backward(recipe, family):
    # Wide layers and few tokens: what grows with the weights then stands out.
    changes = {"hidden_size": 128, "intermediate_size": 256}
    ids, kept = tokens(1, 2), {}
    for name, raw in (("plain", []), ("staged", [recipe])):
        model = tiny(family, **changes)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        install(model, *raw) if raw else None
        parameters |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor, storages=storages, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model, ids)
        kept[name] = sum(storages.values())
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        del loss
    assert kept["staged"] - kept["plain"] <= 0.1 * weights


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_fold_gives_a_plain_module_with_the_same_output(recipe):
    model = tiny("qwen3_moe")
    raw = {**recipe, "targets": ["*_proj", "experts.*"]}
    if recipe["type"] != "lora":
        raw["targets"].append("embed_tokens")
    install(model, raw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    leeway = 1e-6  # plain experts are one operation, staged ones several; a leaner product adds up in another order too
    for _, site in list(iter_sites(model)):
        weight = site.effective_weight().detach()
        folded = site.fold()
        if isinstance(site, LinearSite):
            x = torch.randn(3, site.in_features)
            assert type(folded) is nn.Linear
            is_leaner = site.operands().has_product
            leeway = 1e-3 if is_leaner else leeway
            torch.testing.assert_close(folded(x), site(x), rtol=1e-5 * is_leaner, atol=1e-5 * is_leaner)
            assert torch.equal(folded.weight, weight)
            with torch.no_grad():
                site.weight.copy_(weight)
            site.stages = nn.ModuleDict()
        elif isinstance(site, EmbeddingSite):
            assert type(folded) is nn.Embedding
            assert torch.equal(folded(ids), site(ids))
        else:
            assert not site.stages
            assert torch.equal(site.raw_weight, weight)
    torch.testing.assert_close(model(ids).logits, expected, rtol=leeway, atol=leeway)


def test_copies_and_pickles_are_independent_and_equal():
    model, ids = tiny("qwen3_moe"), tokens()
    install(model, *[RECIPES[name] for name in ("nm_sparsity", "ternary", "lora")])
    expected = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        mine = {name: site.raw_weight for name, site in iter_sites(model)}
        for name, site in iter_sites(twin):
            assert torch.equal(site.raw_weight, mine[name])
            assert site.raw_weight is not mine[name]
            with torch.no_grad():
                site.raw_weight.zero_()
        assert not torch.equal(twin(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


def test_recomputed_runs_once_without_gradients_and_again_with():
    calls, weight = [], torch.randn(3, 3, requires_grad=True)

    def function(x):
        calls.append(1)
        return x @ (weight * 2)

    with torch.no_grad():
        recomputed(function, torch.randn(2, 3))
    assert len(calls) == 1
    recomputed(function, torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_compiles_without_graph_breaks(recipe):
    model = tiny()
    install(model, {**recipe, "targets": ["model.layers.0.mlp.up_proj"]})
    site = model.model.layers[0].mlp.up_proj
    twin = copy.deepcopy(site)  # the first backward spends the decay of a step
    x = torch.randn(4, 32)
    expected = site(x)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in site.named_parameters() if p.grad is not None}
    torch._dynamo.reset()
    got = torch.compile(twin, fullgraph=True)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    for name, parameter in twin.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
