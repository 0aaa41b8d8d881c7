"""LoRA inside the weight and as a branch: formulas, start, freezing, what is kept, errors."""

import math

import pydantic
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Slot
from leanmill.peft_ext.lora.config import Lora
from leanmill.peft_ext.lora.stage import LoraStage
from leanmill.quant.lsq.stage import LsqStage
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from tests.core.tiny import context, install, loss_of, tiny, tokens


def filled(model):
    """Give every B a value, since zeros would hide mistakes."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 6)])
def test_value_and_gradients_are_the_papers(shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    stage = LoraStage(weight, 2, 0.5)
    with torch.no_grad():
        stage.lora_B.normal_()
    a, b = (p.detach().clone().requires_grad_() for p in (stage.lora_A, stage.lora_B))
    plain = weight.detach().clone().requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    out, expected = stage(weight), plain + 0.5 * (b @ a)
    torch.testing.assert_close(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    for got, want in ((stage.lora_A, a), (stage.lora_B, b), (weight, plain)):
        torch.testing.assert_close(got.grad, want.grad)


def test_low_precision_weights_get_fp32_factors_and_one_rounding():
    weight = torch.randn(6, 8).bfloat16()
    stage = LoraStage(weight, 2, 1.0)
    assert stage.lora_A.dtype == stage.lora_B.dtype == torch.float32
    with torch.no_grad():
        stage.lora_B.normal_()
    assert torch.equal(stage(weight), (weight.float() + stage.lora_B @ stage.lora_A).bfloat16())


def test_autocast_does_not_round_the_product():
    weight = torch.randn(16, 16)
    stage = LoraStage(weight, 4, 1.0)
    with torch.no_grad():
        stage.lora_B.normal_()
    expected = stage(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stage(weight), expected)


@pytest.mark.parametrize("shape", [(40, 50), (3, 40, 50)])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values(init, shape):
    stage = LoraStage(torch.empty(shape, device="meta"), 30, 1.0, init=init).to_empty(device="cpu")
    stage.reset_parameters()
    assert (stage.lora_B == 0).all()
    if init == "gaussian":
        assert stage.lora_A.std().item() == pytest.approx(1 / 30, rel=0.1)
    else:
        bound = 1 / math.sqrt(50)  # Kaiming-uniform with a = sqrt(5) over 50 inputs
        assert 0.95 * bound < stage.lora_A.abs().max() <= bound


def test_its_backward_keeps_nothing_weight_sized():
    weight = torch.randn(64, 64, requires_grad=True)
    stage, kept = LoraStage(weight, 2, 1.0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        stage(weight)
    assert max(kept) <= 2 * 64


@pytest.mark.parametrize("where", ["weight", "branch"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_both_places_start_as_the_base_and_compute_the_same(where, use_rslora):
    base, model, ids = tiny(), tiny(), tokens()
    raw = {"type": "lora", "rank": 4, "alpha": 6.0, "where": where, "use_rslora": use_rslora, "targets": ["q_proj"]}
    install(model, raw)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)
    filled(model)
    scaling = 6.0 / (2 if use_rslora else 4)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(factors) == 4
    with torch.no_grad():
        for i, layer in enumerate(base.model.layers):
            b = next(p for n, p in factors.items() if f"layers.{i}." in n and "lora_B" in n)
            a = next(p for n, p in factors.items() if f"layers.{i}." in n and "lora_A" in n)
            layer.self_attn.q_proj.weight += scaling * b @ a
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["weight", "branch"])
def test_only_adapters_train(where):
    model = tiny()
    install(model, {"type": "lora", "rank": 2, "where": where})
    filled(model)
    loss_of(model, tokens()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None) == ("lora_" in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name


def test_branches_keep_the_names_of_sites():
    plain, model = tiny(), tiny()
    install(plain, {"type": "ternary"})
    install(model, {"type": "ternary"}, {"type": "lora", "where": "branch"})
    assert any(".base_layer." in name for name, _ in model.named_parameters())
    assert [name for name, _ in iter_sites(model)] == [name for name, _ in iter_sites(plain)]
    sites = Sites(model)
    assert set(sites.candidates) == set(Sites(plain).candidates)
    assert "14 of 14 linear" in sites.report()
    assert "14 of 14 linear weights with an adapter beside them" in sites.report()
    install(alone := tiny(), {"type": "lora", "where": "branch", "targets": ["q_proj"]})
    assert Sites(alone).report().startswith("2 of 14 linear weights with an adapter beside them; left plain: ")
    again = sites.select(["q_proj"])
    assert [site.stage(Slot.QUANT) is not None for site in again] == [True, True]


def test_branch_beside_a_staged_weight_is_not_masked_or_quantised():
    model, ids = tiny(), tokens()
    install(model, {"type": "lora", "where": "branch", "rank": 4}, {"type": "nm_sparsity"}, {"type": "ternary"})
    filled(model)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    site = layer.base_layer
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (site.effective_weight() + delta).T, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(loss_of(model, ids))


def test_a_branch_keeps_the_parameters_of_other_stages_trainable():
    model = tiny()
    install(model, {"type": "lora", "rank": 2}, {"type": "lora", "rank": 2, "where": "branch", "targets": ["q_proj"]})
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 14 + 2 * 2


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_branches_of_a_model_on_meta_can_be_filled(init):
    with torch.device("meta"):
        model = tiny()
    config = Lora(where="branch", rank=8, init=init, targets=["q_proj"])
    installation = config.install(Sites(model), context())
    installation.add_branches(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.is_meta
    layer.to_empty(device="cpu")
    installation.reset_branch(layer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (b == 0).all()
    assert a.std().item() == pytest.approx(1 / 8 if init == "gaussian" else 1 / math.sqrt(3 * 32), rel=0.25)


def test_weight_adapters_on_experts():
    model, ids = tiny("qwen3_moe"), tokens()
    before = model(ids).logits
    install(model, {"type": "lora", "rank": 2, "targets": ["experts.*"]})
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    filled(model)
    loss_of(model, ids).backward()
    shapes = {name.rsplit(".", 1)[-1]: tuple(p.shape) for name, p in model.named_parameters() if "down_proj.st" in name}
    assert shapes == {"lora_A": (4, 2, 16), "lora_B": (4, 32, 2)}
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n)


def test_branches_on_experts_are_refused_with_the_remedy():
    model = tiny("qwen3_moe")
    with pytest.raises(ConfigError, match=r"linear layers only.*exclude.*where: weight"):
        Lora(where="branch").install(Sites(model), context())
    installation = Lora(where="branch", exclude=["experts.*"]).install(Sites(model), context())
    installation.add_branches(model)
    assert torch.isfinite(loss_of(model, tokens()))


def test_a_second_set_of_branches_is_refused():
    branch = {"type": "lora", "where": "branch"}
    with pytest.raises(ConfigError, match="where: weight"):
        install(tiny(), {**branch, "targets": ["q_proj"]}, {**branch, "targets": ["k_proj"]})


def test_tied_weights_cannot_get_two_deltas():
    model = tiny(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"tied.*exclude"):
        Lora(targets=["embed_tokens", "lm_head", "q_proj"]).install(Sites(model), context())


def test_dropout_needs_a_branch():
    with pytest.raises(pydantic.ValidationError, match="where: branch"):
        Lora(dropout=0.1)
    model, ids = tiny(), tokens()
    install(model, {"type": "lora", "where": "branch", "dropout": 0.5})
    filled(model)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("grid", [False, True], ids=["plain", "learned grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (0, 24)])
def test_the_lean_product_is_that_of_the_merged_weight(grid, dtype, shape):
    torch.manual_seed(0)
    site = LinearSite.adopt(nn.Linear(24, 17), "layer")
    site.put(LoraStage(site.weight, 3, 2.0))
    nn.init.normal_(site.stages["delta"].lora_B, std=0.1)
    if grid:
        site.put(LsqStage(site.weight, 4, granularity="row"))
        site.stages["quant"].initialise(site.weight)
    tokens = torch.randn(shape, dtype=dtype, requires_grad=True)
    direction = torch.randn(*shape[:-1], 17, dtype=dtype)
    wanted = (tokens, *site.parameters())
    assert site.operands().has_product

    found = site(tokens) if dtype == torch.float32 else run_in_bf16(site, tokens)
    lean = torch.autograd.grad(found, wanted, direction)
    merged = F.linear(tokens.float(), site.effective_weight(), site.bias)
    exact = torch.autograd.grad(merged, wanted, direction.float())

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(found.float(), merged, **tolerance)
    for one, other in zip(lean, exact, strict=True):
        torch.testing.assert_close(one.float(), other.float(), **tolerance)


def run_in_bf16(site, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        return site(tokens)


@pytest.mark.parametrize("grid", [False, True], ids=["plain", "learned grid"])
def test_the_lean_product_keeps_nothing_as_large_as_the_weight(grid):
    site = LinearSite.adopt(nn.Linear(256, 256, bias=False), "layer")
    site.weight.requires_grad_(False)
    site.put(LoraStage(site.weight, 2, 2.0))
    if grid:
        site.put(LsqStage(site.weight, 4))
    kept = []

    def keep(tensor):
        if tensor.numel() >= site.weight.numel() and tensor.data_ptr() != site.weight.data_ptr():
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        site(torch.randn(4, 256, requires_grad=True))
    assert not kept


def test_a_mask_between_delta_and_grid_takes_the_merged_weight():
    site = LinearSite.adopt(nn.Linear(24, 17), "layer")
    for stage in (LoraStage(site.weight, 3, 2.0), NMSparsityStage(2, 4), LsqStage(site.weight, 4)):
        site.put(stage)
    assert not site.operands().has_product
