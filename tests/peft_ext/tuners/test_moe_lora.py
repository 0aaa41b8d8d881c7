"""Token-routed LoRA experts against their equations: values, gradients, balance by loss and by bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.core.branches import branch_tensors
from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.moe.balancing.bias import BiasRule
from leanmill.peft_ext.tuners.moe_lora import MoeLoraConfig, MoeLoraLayer
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, install, tiny
from tests.moe.batches import batch_of, num_valid, step


OUT, IN, R, E = 7, 5, 3, 4
WEIGHT = 0.5


def layer_of(dtype: torch.dtype = torch.float32, **options) -> MoeLoraLayer:
    torch.manual_seed(1)
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    config = MoeLoraConfig(**{"r": R, "num_experts": E, "alpha": 2.0 * R, "init_weights": False, **options})
    return MoeLoraLayer(base, "default", config)


def by_hand(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | float, options: dict) -> Tensor:
    """s sum over the chosen experts of g_e B_e A_e x, a token and an expert at a time."""
    rows = []
    for token in x:
        h = weight @ token
        g = h.softmax(-1) if options["score"] == "softmax" else h.sigmoid()
        chosen = (g.detach() + bias).topk(options["top_k"]).indices.tolist()
        total = sum(g[e] for e in chosen) if options["normalise"] else 1.0
        ranks = [slice(e * R, (e + 1) * R) for e in chosen]
        rows.append(sum(2.0 * g[e] / total * (b[:, k] @ (a[k] @ token)) for e, k in zip(chosen, ranks, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"score": "softmax", "top_k": 1, "normalise": False},
        {"score": "softmax", "top_k": 2, "normalise": True},
        {"score": "sigmoid", "top_k": 3, "normalise": False, "balance": "bias"},
    ],
    ids=str,
)
def test_values_and_gradients(options: dict, dtype: torch.dtype):
    layer = layer_of(dtype, **options)
    router = layer.moe_lora_router["default"]
    bias: Any = 0.0
    if "balance" in options:
        bias = router.choice_bias.copy_(torch.tensor([3.0, 0.0, -3.0, 1.0]))
    leaves = (layer.moe_lora_A["default"], layer.moe_lora_B["default"], router.weight)
    x, upstream = torch.randn(2, 4, IN, dtype=dtype, requires_grad=True), torch.randn(2, 4, OUT).to(dtype)
    x0, *own = (t.detach().float().requires_grad_() for t in (x, *leaves))
    weight, constant = layer.base_layer.weight.float(), layer.base_layer.bias.float()
    expected = x0 @ weight.T + constant + by_hand(x0.flatten(0, 1), *own, bias, options).view(2, 4, OUT)
    out = layer(x)
    assert out.dtype == dtype
    out.backward(upstream)
    expected.backward(upstream.float())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(out.float(), expected, **tolerance)
    for got, want in zip((x, *leaves), (x0, *own), strict=True):
        assert got.grad is not None
        error = (got.grad.float() - want.grad).abs().max()
        assert error <= (1e-5 if dtype is torch.float32 else 3e-2) * (1 + want.grad.abs().max())


def test_ranks_that_all_are_taken_are_lora_with_gates():
    """SMoRA's limit: every rank an expert, all of them chosen with equal logits."""
    layer, x = layer_of(r=1, num_experts=6, top_k=6, alpha=3.0), torch.randn(3, IN)
    layer.moe_lora_router["default"].weight.data.zero_()
    delta = layer.moe_lora_B["default"] @ layer.moe_lora_A["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 / 6 * x @ delta.T)
    fresh = layer_of(init_weights=True)
    torch.testing.assert_close(fresh(x), fresh.base_layer(x), rtol=0, atol=0)


def installed(**options):
    torch.manual_seed(0)
    model, offered = tiny("llama"), context()
    raw = {"type": "peft", "method": "moe_lora", "r": 2, "num_experts": 3, "targets": ["q_proj", "down_proj"]}
    found = install_techniques([parse_technique({**raw, "init_weights": False, **options})], model, offered)
    return TrainModule(model, ledger=offered.ledger).train(), found.step_rules


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith("moe_lora_router.default")}


def gradients_by_hand(batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Cross-entropy, and the mean over batches and layers of weight E sum_i f_i P_i, with f of all tokens so far."""
    module, _ = installed(balance="none")
    model, routers, seen = module.model, routers_of(module.model), {}
    for name, router in routers.items():
        router.register_forward_hook(lambda m, args, out, n=name: seen.__setitem__(n, out))
    counts = {name: torch.zeros(3) for name in routers}
    masks = [b.get("token_mask", torch.ones_like(b["labels"], dtype=torch.bool)).flatten() for b in batches]
    mean_tokens = sum(mask.sum() for mask in masks) / len(batches)
    balance = torch.zeros(())
    for batch, mask in zip(batches, masks, strict=True):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        own = torch.zeros(())
        for name, (scores, _, experts) in seen.items():
            counts[name] = counts[name] + F.one_hot(experts[mask, 0], 3).sum(0)
            p = scores.softmax(-1)[mask].mean(0) * mask.sum() / mean_tokens
            own = own + 3 * (counts[name] / counts[name].sum() * p).sum() / len(routers)
        balance = balance + own.detach() / len(batches)
        (loss / num_valid(batches) + WEIGHT * own / len(batches)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, float(balance)


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_of_a_step(padded: bool):
    module, rules = installed(balance_weight=WEIGHT)
    batches = [batch_of(seed, padded=padded) for seed in range(2)]
    expected, balance = gradients_by_hand(batches)
    step(module, rules, batches)
    means, weighted = module.ledger.means(module.ledger.take(), torch.ones(()))
    assert means["lora_router_balance"].item() == pytest.approx(balance, rel=1e-5)
    assert weighted.item() == pytest.approx(WEIGHT * balance, rel=1e-5)
    trained = {n: p.grad for n, p in module.model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert sum("router" in name for name in trained) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(trained[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_biases_move_against_the_loads_of_the_step():
    module, rules = installed(r=1, num_experts=5, top_k=2, balance="bias", bias_rate=0.25)
    counted: dict[str, Tensor] = {name: torch.zeros(5) for name in routers_of(module.model)}

    def count(name: str, out: tuple[Tensor, Tensor, Tensor]) -> None:
        counted[name] += F.one_hot(out[2], 5).sum((0, 1))

    for name, router in routers_of(module.model).items():
        router.register_forward_hook(lambda m, args, out, n=name: count(n, out))
    batches = [batch_of(seed) for seed in range(2)]
    step(module, rules, batches)
    (rule,) = (rule for rule in rules if isinstance(rule, BiasRule))
    rule.after_optimizer(StepContext(step=0, num_steps=1, num_micro_batches=2, skipped=torch.tensor(False)))
    for name, router in routers_of(module.model).items():
        moved = 0.25 * (counted[name].mean() - counted[name]).sign()
        torch.testing.assert_close(router.choice_bias, moved - moved.mean())
        assert router.choice_bias.abs().max() > 0
    assert rule.metrics()["largest_spread"] <= 0.5
    saved = {path for path, _, is_saved in branch_tensors(module.model) if is_saved}
    assert sum("choice_bias" in path for path in saved) == 4
    assert not any(".around." in path for path, _, _ in branch_tensors(module.model))


def test_evaluation_chooses_as_training_does():
    module, _ = installed(balance="bias", top_k=2)
    tokens = torch.randn(6, 32)
    router = next(iter(routers_of(module.model).values()))
    router.choice_bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    in_training = router(tokens)
    module.eval()
    for one, other in zip(in_training, router(tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_biases_are_saved_and_it_is_no_matrix(tmp_path):
    def base() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, IN))
        model.config = {"model_type": "custom"}  # type: ignore[assignment]
        return model

    options = {"r": 1, "num_experts": 6, "top_k": 2, "balance": "bias", "target_modules": ["0"], "init_weights": False}
    model = get_peft_model(base(), MoeLoraConfig(**options)).eval()
    bias = model.base_model.model[0].moe_lora_router["default"].choice_bias.normal_()
    model.save_pretrained(tmp_path)
    reloaded, x = PeftModel.from_pretrained(base(), tmp_path).eval(), torch.randn(9, IN)
    torch.testing.assert_close(reloaded.base_model.model[0].moe_lora_router["default"].choice_bias, bias)
    torch.testing.assert_close(reloaded(x), model(x), rtol=0, atol=0)
    for call in (reloaded.merge_adapter, reloaded.merge_and_unload):
        with pytest.raises(NotImplementedError, match="no one matrix"):
            call()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 5}, "top_k=5 is more than num_experts=4"),
        ({"num_experts": 1}, "num_experts must be an integer of at least 2"),
        ({"score": "max"}, "score must be one of softmax, sigmoid"),
        ({"balance": "luck"}, "balance must be one of loss, bias, none"),
        ({"balance_weight": 0.0}, "balance_weight must be above 0"),
        ({"normalise": True}, "set top_k=2"),
        ({"bias_rate": 0.1}, "bias_rate=0.1 is read with balance=bias alone"),
        ({"balance": "none", "balance_weight": 0.1}, "balance_weight=0.1 is read with balance=loss alone"),
        ({"balance": "bias", "bias_rate": float("inf")}, "bias_rate must be above 0 and finite"),
    ],
)
def test_what_is_refused(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        MoeLoraConfig(**options)
    with pytest.raises(ConfigError, match=expected):
        install(tiny("llama"), {"type": "peft", "method": "moe_lora", **options})
