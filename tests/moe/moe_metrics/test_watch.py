"""What is logged of experts against plain code on the routers' own outputs; and looking changes nothing, bitwise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique, unasked_techniques
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.compile import compile_blocks
from leanmill.moe.load_statistics import specialisation
from leanmill.moe.loads.loads import Loads
from leanmill.moe.moe_metrics.rule import of_layer
from leanmill.moe.moe_metrics.watch import NUM_SUMS, Held, Looks, RouterWatch, look
from leanmill.parallel.launch import Ranks
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.contract_training import full_parameters, recipe_of, train
from tests.core.tiny import context, install, tiny
from tests.distributed import run_ranks
from tests.moe.batches import batch_of, step


NUM_EXPERTS, TOP_K = 4, 2
Routed = list[tuple[Tensor, Tensor]]


def spread(family: str) -> Any:
    """A model whose loads are uneven."""
    model = tiny(family)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.mul_(20)
    return model


def watched(family: str, mode: str = "none", *, compiled: bool = False, **more: Any) -> tuple[TrainModule, Any]:
    model, offered = spread(family), context()
    raw = [{"type": "moe_metrics", **more}]
    installed = install_techniques([parse_technique(one) for one in raw], model, offered)
    module = TrainModule(model, ledger=offered.ledger).train()
    apply_activation_checkpointing(model, mode)
    if compiled:
        compile_blocks(model)
    return module, installed


def metrics_of(installed: Any) -> dict[str, float]:
    (found,) = (rule.metrics() for rule in installed.step_rules if rule.name == "experts")
    return dict(found)


def routed_by(family: str, batches: list[dict[str, Tensor]]) -> list[Routed]:
    """(logits, experts) of every layer, of all tokens of all batches, padding left out."""
    model, found = spread(family), []
    for batch in batches:
        seen: Routed = []
        hooks = [
            module.register_forward_hook(lambda *call, seen=seen: seen.append((call[-1][0].float(), call[-1][2])))
            for name, module in model.named_modules()
            if name.endswith("mlp.gate")
        ]
        with torch.no_grad():
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        for hook in hooks:
            hook.remove()
        mask = batch.get("token_mask", torch.ones_like(batch["labels"], dtype=torch.bool)).flatten()
        found.append([(logits[mask], experts[mask]) for logits, experts in seen])
    return found


def by_hand(family: str, batches: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """By layer."""
    layers = []
    for parts in zip(*routed_by(family, batches), strict=True):
        logits, experts = (torch.cat(one) for one in zip(*parts, strict=True))
        scores = logits.sigmoid() if family == "deepseek_v3" else logits.exp()
        shares = scores / scores.sum(-1, keepdim=True)
        loads = torch.bincount(experts.flatten(), minlength=NUM_EXPERTS).double()
        load = loads / loads.sum()
        layers.append(
            {
                "max_violation": (loads.max() / loads.mean() - 1).item(),
                "load_entropy": (-torch.xlogy(load, load).sum() / math.log(NUM_EXPERTS)).item(),
                "dead_experts": (loads == 0).sum().item(),
                "drop_rate": 0.0,
                "router_entropy": (-torch.xlogy(shares, shares).sum(-1).mean() / math.log(NUM_EXPERTS)).item(),
                "logit_scale": logits.square().mean().sqrt().item(),
            }
        )
    return layers


def check(found: dict[str, float], family: str, batches: list[dict[str, Tensor]]) -> None:
    wanted = by_hand(family, batches)
    first = 1 if family == "deepseek_v3" else 0  # its first layer is dense
    for name in wanted[0]:
        values = [one[name] for one in wanted]
        total = sum(values) if name == "dead_experts" else sum(values) / len(values)
        assert found[name] == pytest.approx(total, rel=1e-4, abs=1e-6), name
        for layer, value in enumerate(values, first):
            assert found[f"{name}/{layer}"] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, layer)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_step_s_numbers_by_hand(family, mode, padded):
    module, installed = watched(family, mode)
    assert metrics_of(installed) == {}
    for seeds in ((1, 2), (3, 4)):
        batches = [batch_of(seed, padded=padded) for seed in seeds]
        step(module, installed.step_rules, batches)
        check(metrics_of(installed), family, batches)


def _on_a_rank() -> dict[str, float]:
    module, installed = watched("mixtral", by_layer=False)
    everyone = [batch_of(seed) for seed in (1, 2, 3, 4)]
    mine = everyone[2 * dist.get_rank() :][:2]
    step(module, installed.step_rules, mine, everyone=everyone, num_ranks=2)
    return metrics_of(installed)


def test_loads_are_those_of_all_ranks():
    first, second = run_ranks(_on_a_rank, 2)
    assert first == second
    wanted = by_hand("mixtral", [batch_of(seed) for seed in (1, 2, 3, 4)])
    assert first["max_violation"] == pytest.approx(sum(one["max_violation"] for one in wanted) / 2)
    assert not any("/" in name for name in first)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_dropped_and_closed_choices_by_hand(score):
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, -1.0, 30.0], [9.0, 9.0, torch.nan]])
    is_kept = torch.tensor([[True, False], [True, True], [True, True]])
    sums = look(logits, is_kept, torch.tensor([True, True, False]), is_sigmoid=score == "sigmoid")
    entropy = 0.0
    for row in ([1.0, 2.0], [0.0, -1.0, 30.0]):
        scores = torch.tensor(row, dtype=torch.float64)
        scores = scores.exp() if score == "softmax" else scores.sigmoid()
        shares = scores / scores.sum()
        entropy -= (shares * shares.log()).sum().item()
    assert sums.tolist() == pytest.approx([entropy, (1 + 4 + 0 + 1 + 900) / 3, 1, 2], rel=1e-5)


@pytest.mark.parametrize("most", [10**6, 0])
def test_routers_are_looked_at_together_and_each_gets_its_own(most, monkeypatch):
    monkeypatch.setattr("leanmill.moe.moe_metrics.watch._MOST_HELD", most)
    generator, looks, wanted = torch.Generator().manual_seed(0), Looks(), []
    sums = [torch.ones(NUM_SUMS) for _ in range(5)]
    # Layers of another width, score or with dropped choices are others' sums; two of a kind are one stack.
    for into, (width, drops, is_sigmoid) in zip(
        sums, [(4, False, False), (4, True, False), (6, False, True), (4, False, False), (4, True, False)], strict=True
    ):
        logits = torch.randn(7, width, generator=generator).bfloat16()
        is_kept = torch.rand(7, 2, generator=generator) < 0.5 if drops else None
        looks.hold(Held(into, logits, is_kept, None, is_sigmoid))
        wanted.append(1 + look(logits.float(), is_kept, None, is_sigmoid=is_sigmoid))
    looks.look()
    torch.testing.assert_close(torch.stack(sums), torch.stack(wanted), msg="bf16 logits are summed in fp32")
    looks.look()
    torch.testing.assert_close(torch.stack(sums), torch.stack(wanted), msg="what was looked at is kept no longer")


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_between_reports_cost_nothing_and_say_nothing(compiled, balanced):
    model, offered = spread("mixtral"), context()
    raw = [{"type": "moe_metrics"}, *([{"type": "router_balance", "weight": 0.5}] if balanced else [])]
    installed = install_techniques([parse_technique(one) for one in raw], model, offered)
    module = TrainModule(model, ledger=offered.ledger).train()
    if compiled:
        compile_blocks(model)
    (loads,) = (rule for rule in installed.step_rules if isinstance(rule, Loads))
    watches = [one for one in model.modules() if isinstance(one, RouterWatch)]
    for seed, is_reported in ((1, False), (2, True), (3, False), (4, True)):
        for one in watches:
            one.sums.value.fill_(torch.nan)
        step(module, installed.step_rules, [batch_of(seed)], is_reported=is_reported)
        assert all(one.sums.value.isfinite().all() == (is_reported or balanced) for one in watches)
        assert (loads.last_step is not None) == (is_reported or balanced)
        if is_reported:
            assert metrics_of(installed).keys() >= {"max_violation", "router_entropy/1"}
        else:
            assert metrics_of(installed) == {}
    if not balanced:
        check(metrics_of(installed), "mixtral", [batch_of(4)])


def test_dropped_choices_are_a_rate():
    found = of_layer([5, 0, 3], [4.0, 8.0, 2.0, 4.0])
    assert found["drop_rate"] == 0.25
    assert found["dead_experts"] == 1
    assert found["router_entropy"] == pytest.approx(1 / math.log(3))
    assert found["logit_scale"] == pytest.approx(2**0.5)
    assert all(math.isfinite(value) for value in of_layer([0.0, 0.0], [0.0] * NUM_SUMS).values())


@pytest.mark.parametrize("names", [("mixtral",), ("router_balance", "mixtral")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_looking_changes_nothing_bitwise(names, precision):
    one, trained = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")), []
    for watch in (True, False):
        recipe = recipe_of(names, {"type": "single"}, "", 1, precision)
        recipe = recipe.model_copy(update={"log": recipe.log.model_copy(update={"watch": watch})})
        engine, loop = train(recipe, one)
        assert any(rule.name == "experts" for rule in loop.step_rules) is watch
        trained.append(full_parameters(engine))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_is_installed_unasked_where_there_are_routers_and_once_if_asked():
    (config,) = unasked_techniques()
    assert config.watches(tiny("mixtral"))
    assert not config.watches(tiny("llama"))
    with pytest.raises(ConfigError, match="listed twice"):
        install(tiny("mixtral"), {"type": "moe_metrics"}, {"type": "moe_metrics", "by_layer": False})


def held_out(module: TrainModule, probe: Any, domains: dict[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """What an evaluation of one process does."""
    probe.take()
    counts = {}
    for name, batches in domains.items():
        for batch in batches:
            probe.begin(batch)
            with torch.no_grad():
                module.eval()(batch)
        counts[name] = probe.take()
    return counts


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_experts_of_domains_by_hand(compiled):
    module, installed = watched("mixtral", compiled=compiled)
    (probe,) = installed.probes
    step(module, installed.step_rules, [batch_of(9)])  # counts of training are none of an evaluation's
    check(metrics_of(installed), "mixtral", [batch_of(9)])
    padded = batch_of(3, padded=True)
    missing = batch_of(4)
    missing["labels"][1:] = -100  # rows that only stand in
    domains = {"a": [batch_of(1), batch_of(2)], "b": [padded, missing]}
    found = probe.find(held_out(module, probe, domains))
    kept = {name: value[:1] for name, value in missing.items()}
    for name, batches in {"a": domains["a"], "b": [padded, kept]}.items():
        routed = routed_by("mixtral", batches)
        wanted = [
            sum(torch.bincount(part[layer][1].flatten(), minlength=NUM_EXPERTS) for part in routed).tolist()
            for layer in range(2)
        ]
        assert found.table["domains"][name] == wanted
    assert found.table["layers"] == [0, 1]
    layers = [specialisation({n: t[i] for n, t in found.table["domains"].items()}) for i in range(2)]
    assert found.metrics["specialisation/1"] == layers[1]
    assert found.metrics["specialisation"] == pytest.approx(sum(layers) / 2)
    assert found.notes == ()


def test_a_domain_without_tokens_is_said_to_have_none():
    _, installed = watched("mixtral")
    (probe,) = installed.probes
    some = torch.tensor([3.0, 1.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0])
    found = probe.find({"a": some, "empty": torch.zeros(8)})
    assert found.metrics == {}
    assert found.notes == ("no held-out token of 'empty' got to an expert, so it counts nowhere",)
    assert probe.find({"a": some, "b": some.flip(0), "empty": torch.zeros(8)}).metrics["specialisation"] == 1
