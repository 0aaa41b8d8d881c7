"""Importance and masks by LoRAPrune's equations, step by step."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.site import Site
from leanmill.core.sites import Sites
from leanmill.parallel.views import NativeViews
from leanmill.sparse.lora_prune.rule import still_kept
from tests.core.tiny import context


NUM_STEPS, SMOOTHING = 6, 0.75
SIZES = {"hidden_size": 12, "intermediate_size": 7, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
SIZES |= {"vocab_size": 13, "num_hidden_layers": 2}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def installed(lora=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).to(dtype)
    sites = Sites(model)
    given = {"sparsity": 0.5, "begin": 0.0, "end": 0.7, "update_every_steps": 2, "smoothing": SMOOTHING}
    given |= {"spared_first": 0.5, "spared_last": 0, **options}
    techniques = [{"type": "lora", "rank": 2, "alpha": 3.0} | (lora or {}), {"type": "lora_prune", **given}]
    installations = [parse_technique(one).install(sites, context()) for one in techniques]
    for module in model.modules():
        if isinstance(module, Site):
            for stage in module.weight_stages():
                stage.reset_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    (rule,) = installations[1].step_rules
    rule.check()
    return model, rule


def by_hand(model, layer):
    """Importance of the groups and neurons of a layer, one matrix at a time, as the authors' code sums it."""
    heads, neurons = torch.zeros(3), torch.zeros(7)
    for name in PROJECTIONS:
        half = layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp
        site = getattr(half, name)
        (delta, _) = site.weight_stages()
        a, b, grad_a, grad_b = delta.lora_A, delta.lora_B, delta.lora_A.grad, delta.lora_B.grad
        gradient = grad_b @ a + b @ grad_a - grad_b @ grad_a
        s = (gradient * (site.weight.float() + 1.5 * b @ a)).abs().detach()
        s = s.sum(0) if name in ("o_proj", "down_proj") else s.sum(1)
        if half is layer.self_attn:
            s = s.view(3, -1).sum(1)
        s = s / (s.norm() + 1e-8)
        if half is layer.self_attn:
            heads += s
        else:
            neurons += s
    return heads, neurons


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_is_averaged_and_the_least_of_a_layer_is_masked_more_and_more(dtype):
    model, rule = installed(dtype=dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layer = model.model.layers[1]
    means = [torch.zeros(3), torch.zeros(7)]
    masked = [set(), set()]
    last = 4  # the first step at or behind 0.7 x 6
    for step in range(NUM_STEPS):
        skipped = step == 2
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = torch.Generator().manual_seed(100 * step + len(name))
                parameter.grad = torch.randn(parameter.shape, generator=seed)
        found = by_hand(model, layer)
        if not skipped:
            means = [SMOOTHING * m + (1 - SMOOTHING) * f for m, f in zip(means, found, strict=True)]
        views = NativeViews(model, optimizer)
        now = StepContext(
            step=step, num_steps=NUM_STEPS, num_micro_batches=1, views=views, skipped=torch.tensor(skipped)
        )
        rule.before_optimizer(now)
        with torch.no_grad():
            rule.after_optimizer(now)
        progress = min(1.0, step / 4.2)
        # What was due in the skipped step is done in the next one.
        if step in (0, 3, last) and not skipped:
            share = 0.5 - 0.5 * (1 - (1.0 if step == last else progress)) ** 3
            for number, (mean, gone) in enumerate(zip(means, masked, strict=True)):
                wanted = int(len(mean) * share)
                order = sorted(range(len(mean)), key=lambda i: (i not in gone, float(mean[i])))
                masked[number] = set(order[:wanted]) | gone
        for part, gone in (("self_attn", masked[0]), ("mlp", masked[1])):
            for name in PROJECTIONS:
                if not hasattr(getattr(layer, part), name):
                    continue
                site = getattr(getattr(layer, part), name)
                assert set((~site.stages["mask"].kept).nonzero().flatten().tolist()) == gone, (step, name)
                weight = site.effective_weight().detach()
                parts = weight.movedim(1, 0) if name in ("o_proj", "down_proj") else weight
                zeros = (parts.reshape(site.stages["mask"].count, -1) == 0).all(1)
                assert set(zeros.nonzero().flatten().tolist()) == gone
    assert [len(gone) for gone in masked] == [1, 3]
    assert not hasattr(model.model.layers[0].mlp.up_proj.stages, "mask")
    assert rule.metrics() == {"masked_heads": pytest.approx(1 / 3), "masked_neurons": pytest.approx(3 / 7)}


def test_what_is_masked_has_no_gradient_and_stays_masked():
    model, _ = installed()
    site = model.model.layers[1].mlp.up_proj
    delta, mask = site.weight_stages()
    mask.kept[2] = False
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    (site(x) * torch.randn(5, 7)).sum().backward()
    assert not delta.lora_B.grad[2].any()
    assert delta.lora_B.grad[1].any()
    kept = torch.tensor([False, True, True, True])
    assert still_kept(torch.tensor([9.0, 3.0, 1.0, 2.0]), kept, 0.5).tolist() == [False, True, False, True]
    many = torch.arange(1.0, 101.0)
    assert int(still_kept(many, many > 0, 0.29).sum()) == 71
    assert int(still_kept(many, many > 0, 0.295).sum()) == 71


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        ({"targets": ["*.mlp.*"]}, {}, r"reads the gradients of one adapter in the weight of model\..*, which has 0"),
        ({}, {"spared_last": 2}, "spares all 2 layers"),
        ({}, {"begin": 0.8}, "is not before end"),
    ],
)
def test_requests_that_do_not_fit(lora, options, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        installed(lora, **options)
