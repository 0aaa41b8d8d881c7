"""Balance losses against their equations: plain code on all micro-batches of all ranks, autograd per parameter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.compile import compile_blocks
from leanmill.moe.router_balance.config import RouterBalance
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import MIXTURES, VOCAB_SIZE, context, tiny
from tests.distributed import run_ranks


WEIGHT, Z_WEIGHT, TOP_K, NUM_EXPERTS = 0.5, 0.125, 2, 4


def batch_of(seed: int, rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB_SIZE, (rows, length), generator=generator)
    labels[0, : seed + 2] = -100
    return {
        "input_ids": torch.randint(VOCAB_SIZE, (rows, length), generator=generator),
        "labels": labels,
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
    }


def num_valid(num_batches: int) -> Tensor:
    return torch.stack([(batch_of(seed)["labels"] != -100).sum() for seed in range(num_batches)]).sum().float()


def spread(model: nn.Module) -> nn.Module:
    """Scale routers up, so that loads differ."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.mul_(20)
    return model


def shares_by_hand(logits: Tensor, family: str) -> Tensor:
    if family == "deepseek_v3":
        scores = torch.sigmoid(logits)
        return scores / scores.sum(-1, keepdim=True)
    return torch.softmax(logits, -1)


def by_hand(
    family: str, num_ranks: int, num_micro: int, scope: str
) -> tuple[dict[str, Tensor], dict[str, float], float]:
    """Gradients of the objective, its parts, and the largest load over the mean one."""
    model = spread(tiny(family))
    routed: list[tuple[Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *call: routed.append((call[-1][0].float(), call[-1][2])))
    objective, parts, running = torch.zeros(()), {"balance": 0.0, "z": 0.0}, None
    for micro in range(num_micro):
        everyone = []
        for rank in range(num_ranks):
            routed.clear()
            batch = batch_of(rank * num_micro + micro)
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
            objective = objective + loss / num_valid(num_ranks * num_micro)
            everyone.append(list(routed))
        # One row a layer and rank: how many places each expert has got.
        places = torch.stack([torch.stack([F.one_hot(e, NUM_EXPERTS).sum((0, 1)) for _, e in one]) for one in everyone])
        running = places.sum(0) if running is None else running + places.sum(0)
        for rank, layers in enumerate(everyone):
            for layer, (scores, _) in enumerate(layers):
                load = running[layer] if scope == "global_batch" else places[rank, layer]
                f = load / load.sum()
                balance = NUM_EXPERTS * (f * shares_by_hand(scores, family).mean(0)).sum()
                z = torch.logsumexp(scores, -1).square().mean()
                share = 1 / (len(layers) * num_ranks * num_micro)
                objective = objective + share * (WEIGHT * balance + Z_WEIGHT * z)
                parts["balance"] += float(share * balance.detach())
                parts["z"] += float(share * z.detach())
    objective.backward()
    max_load = (running.max(-1).values / running.float().mean(-1)).mean()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, parts, float(max_load)


def module_of(family: str, scope: str, mode: str = "none", compiled: bool = False, **changes: object):
    model = spread(tiny(family, **changes))
    offered = context()
    raw = {"type": "router_balance", "weight": WEIGHT, "z_weight": Z_WEIGHT, "scope": scope}
    installed = install_techniques([parse_technique(raw)], model, offered)
    module = TrainModule(model, ledger=offered.ledger).train()
    apply_activation_checkpointing(model, mode)
    if compiled:
        compile_blocks(model)
    return module, installed.step_rules[0]


def step(module: TrainModule, rule, num_ranks: int, num_micro: int, rank: int = 0) -> None:
    """What an engine does whose reductions average."""
    scale = num_ranks / num_valid(num_ranks * num_micro)
    module.ledger.begin_step(token_scale=scale, num_micro_batches=num_micro)
    told = StepContext(step=0, num_steps=1, num_micro_batches=num_micro)
    rule.begin_step(told)
    for micro in range(num_micro):
        (module(batch_of(rank * num_micro + micro))["total"] * scale).backward()
    rule.before_optimizer(told)


def check(module: TrainModule, sums: Tensor, rule, wanted: tuple[dict[str, Tensor], dict[str, float], float]) -> None:
    gradients, parts, max_load = wanted
    for name, gradient in gradients.items():
        found = module.model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    means, weighted = module.ledger.means(sums, torch.ones(()))
    assert means["router_balance"].item() == pytest.approx(parts["balance"], rel=1e-5)
    assert means["router_z"].item() == pytest.approx(parts["z"], rel=1e-5)
    assert weighted.item() == pytest.approx(WEIGHT * parts["balance"] + Z_WEIGHT * parts["z"], rel=1e-5)
    assert rule.metrics()["max_load"] == pytest.approx(max_load)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("scope", ["global_batch", "micro_batch"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_process(family, scope, num_micro, mode):
    module, rule = module_of(family, scope, mode)
    step(module, rule, 1, num_micro)
    check(module, module.ledger.take(), rule, by_hand(family, 1, num_micro, scope))


@pytest.mark.parametrize("family", MIXTURES)
def test_families(family):
    module, rule = module_of(family, "global_batch", "selective")
    step(module, rule, 1, 1)
    check(module, module.ledger.take(), rule, by_hand(family, 1, 1, "global_batch"))


CASES = [(scope, num_micro) for scope in ("global_batch", "micro_batch") for num_micro in (1, 2)]


def _on_a_rank() -> None:
    for scope, num_micro in CASES:
        module, rule = module_of("mixtral", scope, "full")
        step(module, rule, 2, num_micro, dist.get_rank())
        sums = module.ledger.take()
        for tensor in (sums, *(p.grad for p in module.parameters())):
            dist.all_reduce(tensor)
        for parameter in module.parameters():
            parameter.grad.div_(2)
        check(module, sums, rule, by_hand("mixtral", 2, num_micro, scope))


def test_two_ranks():
    run_ranks(_on_a_rank, 2)


def test_the_global_loss_is_that_of_one_batch_however_it_is_shared_out():
    module, rule = module_of("mixtral", "global_batch")
    parts = [batch_of(0), batch_of(1)]
    scale = 1 / num_valid(2)
    module.ledger.begin_step(token_scale=scale, num_micro_batches=1)
    rule.begin_step(StepContext(step=0, num_steps=1, num_micro_batches=1))
    (module({name: torch.cat([part[name] for part in parts]) for name in parts[0]})["total"] * scale).backward()
    shared_out = by_hand("mixtral", 2, 1, "global_batch")
    check(module, module.ledger.take(), rule, shared_out)
    of_each, _, _ = by_hand("mixtral", 2, 1, "micro_batch")
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(of_each[router], shared_out[0][router], rtol=1e-3), "the scopes differ here"


def test_layers_share_one_compiled_graph_and_count_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, rule = module_of("mixtral", "global_batch", "full")
    for block in module.model.model.layers:
        block.compile(backend="aot_eager")
    step(module, rule, 1, 2)
    check(module, module.ledger.take(), rule, by_hand("mixtral", 1, 2, "global_batch"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_equal_loads_cost_one_whatever_the_number_of_experts_a_token():
    for top_k in (1, 2, 4):
        module, rule = module_of("mixtral", "global_batch", num_experts_per_tok=top_k)
        for name, parameter in module.model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.data.zero_()
        step(module, rule, 1, 1)
        means, _ = module.ledger.means(module.ledger.take(), torch.ones(()))
        assert means["router_balance"].item() == pytest.approx(1.0, abs=1e-6)


def test_transformers_own_loss_is_not_added_too():
    module, rule = module_of("mixtral", "global_batch", output_router_logits=True, router_aux_loss_coef=10.0)
    step(module, rule, 1, 1)
    check(module, module.ledger.take(), rule, by_hand("mixtral", 1, 1, "global_batch"))


def test_eval_is_the_plain_model_and_counts_nothing():
    module, rule = module_of("olmoe", "global_batch")
    batch = batch_of(0)
    assert torch.equal(module.eval()(batch)["total"], TrainModule(spread(tiny("olmoe"))).eval()(batch)["total"])
    assert not module.ledger.take().any()
    assert rule.metrics() == {}


def test_a_dense_model_is_refused_at_installation():
    with pytest.raises(ConfigError, match="router.*mixtral"):
        install_techniques([RouterBalance()], tiny("llama"), context())


def test_a_second_entry_is_refused():
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([RouterBalance(), RouterBalance(weight=0.1)], tiny("mixtral"), context())


def test_an_entry_that_adds_nothing_is_refused():
    with pytest.raises(ValueError, match="weight: 0.01"):
        parse_technique({"type": "router_balance", "weight": 0, "z_weight": 0})
