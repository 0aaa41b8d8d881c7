"""Biases move by algorithm 1 of arXiv:2408.15664, centred, once a step, and are nothing but buffers of the model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.export import export_model
from leanmill.moe.balancing.bias import bias_step
from leanmill.moe.bias_balance.config import BiasBalance
from leanmill.moe.loads.loads import Loads
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.run import run
from leanmill.trainer.train_module import TrainModule
from tests.contract_models import MODELS
from tests.core.tiny import context, tiny
from tests.data.samples import write_jsonl
from tests.moe.batches import batch_of, counts_of, step


RATE, NAME = 0.01, "model.layers.1.mlp.gate.e_score_correction_bias"
CHANGES = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1}


def uneven():
    """A plain model whose routers prefer some experts."""
    model = tiny("deepseek_v3", **CHANGES)
    model.model.layers[1].mlp.gate.weight.data.mul_(20)
    return model


def biased(*more: dict[str, object]):
    model, offered = uneven(), context()
    raw = [{"type": "bias_balance", "rate": RATE, "until": 0.75}, *more]
    installed = install_techniques([parse_technique(one) for one in raw], model, offered)
    return TrainModule(model, ledger=offered.ledger).train(), installed.step_rules


def choices(bias: Tensor, batches: list[dict[str, Tensor]]) -> Tensor:
    """How often each expert of the one mixture is chosen by a plain model with this bias [E]."""
    model = uneven()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(bias)
    counts = torch.zeros(8)
    for batch in batches:
        seen: list[Tensor] = []
        hook = gate.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1][2]))
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        hook.remove()
        counts += torch.bincount(seen[0].flatten(), minlength=8)
    return counts


def end(rules, number: int, *, skipped: bool = False) -> None:
    told = StepContext(step=number, num_steps=4, num_micro_batches=2, skipped=torch.tensor(skipped))
    for rule in rules:
        rule.after_optimizer(told)


def test_biases_follow_the_loads_of_whole_steps():
    module, rules = biased()
    bias = torch.zeros(8)
    for number in range(4):
        batches = [batch_of(3 * number), batch_of(3 * number + 1)]
        step(module, rules, batches)
        counts = choices(bias, batches)
        end(rules, number, skipped=number == 1)
        if number not in (1, 3):  # skipped; and after three quarters of the run they rest
            for expert in range(8):
                bias[expert] += RATE * torch.sign(counts.mean() - counts[expert])
            bias -= bias.mean()
        torch.testing.assert_close(module.model.get_buffer(NAME), bias, rtol=0, atol=1e-7)
    assert bias.abs().max() > RATE
    told = next(rule for rule in rules if rule.name == "bias_balance").metrics()
    assert told["largest_spread"] == pytest.approx(float(bias.max() - bias.min()))


def test_a_step_keeps_the_mean_and_leaves_equal_loads_alone():
    assert bias_step(torch.tensor([3.0, 3.0, 3.0]).double(), 0.1).tolist() == [0, 0, 0]
    moved = bias_step(torch.tensor([9.0, 1.0, 1.0, 1.0]).double(), 0.1)
    assert moved.tolist() == pytest.approx([-0.15, 0.05, 0.05, 0.05])


def test_biases_even_out_loads():
    module, rules = biased()
    module.model.get_buffer(NAME)[0] = 0.4
    (loads,) = [rule for rule in rules if isinstance(rule, Loads)]
    found = []
    for _ in range(40):
        step(module, rules, [batch_of(1)])
        end(rules, 0)
        counts = counts_of(loads)
        found.append(float(counts.max() / counts.mean()))
    assert found[0] > 2
    assert sum(found[-5:]) / 5 < 1.25


def test_no_gradient_reaches_a_bias_and_none_is_a_loss():
    module, rules = biased()
    plain = TrainModule(uneven()).train()
    batch = batch_of(1)
    step(module, rules, [batch])
    (plain(batch)["total"] / (batch["labels"] != -100).sum()).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert not module.ledger.open_accounts


def test_shares_its_counts_with_a_loss():
    _, rules = biased({"type": "router_balance", "scope": "sequence", "weight": 1e-4})
    assert sorted(rule.name for rule in rules) == ["bias_balance", "router_balance", "router_loads"]


HELD_ELSEWHERE = {
    "ernie4_5_moe": "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias",
    "minimax_m2": "model.layers.0.mlp.e_score_correction_bias",
}


@pytest.mark.parametrize("family", HELD_ELSEWHERE)
def test_a_bias_that_the_family_holds_elsewhere_moves_and_is_the_plain_model_s(family):
    model, offered = tiny(family), context()
    installed = install_techniques([BiasBalance(rate=RATE)], model, offered)
    module, rules = TrainModule(model, ledger=offered.ledger).train(), installed.step_rules
    (loads,) = [rule for rule in rules if isinstance(rule, Loads)]
    bias, wanted = model.get_buffer(HELD_ELSEWHERE[family]), torch.zeros(4)
    for number in range(3):
        step(module, rules, [batch_of(number)])
        end(rules, 0)
        wanted += bias_step(loads.part(loads.last_step, loads.layers[0].counts), RATE).float()
        torch.testing.assert_close(bias.flatten(), wanted, rtol=0, atol=1e-7)
    assert wanted.abs().max() > RATE
    plain = tiny(family, seed=1)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".around." not in name})
    ids = batch_of(9)["input_ids"]
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_family_without_a_bias_is_refused(family):
    with pytest.raises(ConfigError, match="gate has no bias.*deepseek_v3.*router_balance"):
        install_techniques([BiasBalance()], tiny(family), context())


def test_a_second_entry_and_a_frozen_router_are_refused():
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([BiasBalance(), BiasBalance()], tiny("deepseek_v3"), context())
    lora = parse_technique({"type": "lora", "rank": 2, "alpha": 4})
    with pytest.raises(ConfigError, match="freezes.*lora"):
        install_techniques([BiasBalance(), lora], tiny("deepseek_v3"), context())


def recipe(folder) -> Recipe:
    return Recipe(
        run_dir=str(folder / "run"),
        device="cpu",
        model={"config": MODELS["deepseek_v3"] | {"vocab_size": 300, "initializer_range": 0.2}},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        techniques=[{"type": "bias_balance", "rate": 0.003}],
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 4, "precision": "fp32", "deterministic": True, "activation_checkpointing": "full"},
        checkpoint={"every_steps": 2},
        log={"every_steps": 1, "tensorboard": False},
    )


def test_resumed_bitwise_and_exported(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(60)])
    last, exported = tmp_path / "run/checkpoints/step-00000004", tmp_path / "exported"
    run(recipe(tmp_path))
    export_model(last, exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 1
    assert all(b.dtype == torch.float32 and b.unique().numel() > 1 for b in biases.values())
    shutil.rmtree(last)
    assert run(recipe(tmp_path)).step == 4
    export_model(last, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "bias_balance/largest_spread" in next(line for line in lines if line["kind"] == "step")["metrics"]
