"""Balance losses against their equations: plain code on all micro-batches of all ranks, autograd per parameter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.moe.loads.loads import Loads
from leanmill.moe.router_balance.config import RouterBalance
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import MIXTURES, context, tiny
from tests.distributed import run_ranks
from tests.moe.batches import batch_of, counts_of, joined, step
from tests.moe.router_balance.by_hand import Found, by_hand


WEIGHT, Z_WEIGHT = 0.5, 0.125
WEIGHTS = {"balance": WEIGHT, "z": Z_WEIGHT}
RAW = {"type": "router_balance", "weight": WEIGHT, "z_weight": Z_WEIGHT}
SCOPES = ("sequence", "micro_batch", "data_parallel", "global_batch")


def spread(model: nn.Module) -> nn.Module:
    """Scale routers up, so that loads differ."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.mul_(20)
    return model


def steps_of(num_ranks: int, num_micro: int, *, padded: bool = False) -> list[list[dict[str, Tensor]]]:
    return [[batch_of(rank * num_micro + m, padded=padded) for m in range(num_micro)] for rank in range(num_ranks)]


def module_of(family: str, mode: str = "none", *, raw: dict[str, object] | None = None, **changes: object):
    model = spread(tiny(family, **changes))
    offered = context()
    installed = install_techniques([parse_technique(RAW | (raw or {}))], model, offered)
    module = TrainModule(model, ledger=offered.ledger).train()
    apply_activation_checkpointing(model, mode)
    return module, installed.step_rules


def last_counts(rules) -> Tensor | None:
    (loads,) = (rule for rule in rules if isinstance(rule, Loads))
    return None if loads.last_step is None else counts_of(loads)


def plain(family: str, **changes: object) -> nn.Module:
    return spread(tiny(family, **changes))


def check(module: TrainModule, sums: Tensor, rules, wanted: Found) -> None:
    for name, gradient in wanted.gradients.items():
        found = module.model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    means, weighted = module.ledger.means(sums, torch.ones(()))
    assert means["router_balance"].item() == pytest.approx(wanted.balance, rel=1e-5)
    assert means["router_z"].item() == pytest.approx(wanted.z, rel=1e-5)
    assert torch.equal(last_counts(rules), torch.cat(wanted.counts).double())
    if "router_device" in means:
        assert means["router_device"].item() == pytest.approx(wanted.device, rel=1e-5)
        assert means["router_communication"].item() == pytest.approx(wanted.communication, rel=1e-5)
    else:
        assert weighted.item() == pytest.approx(WEIGHT * wanted.balance + Z_WEIGHT * wanted.z, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("family", "mode"), [("mixtral", "full"), ("qwen3_moe", "none")])
def test_one_process(family, mode, scope, padded):
    module, rules = module_of(family, mode, raw={"scope": scope})
    steps = steps_of(1, 2, padded=padded)
    step(module, rules, steps[0])
    check(
        module,
        module.ledger.take(),
        rules,
        by_hand(plain(family), steps, family=family, scope=scope, weights=WEIGHTS),
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_families(family):
    module, rules = module_of(family, "selective")
    steps = steps_of(1, 1)
    step(module, rules, steps[0])
    check(module, module.ledger.take(), rules, by_hand(plain(family), steps, family=family, weights=WEIGHTS))


def test_rows_of_a_sigmoid_router_count_by_their_affinities_alone():
    """As DeepSeek-V3's equation has it: neither its bias nor its groups of devices decide whose places are counted."""
    module, rules = module_of("deepseek_v3", raw={"scope": "sequence"}, n_group=1)
    steps = steps_of(1, 1)
    step(module, rules, steps[0])
    wanted = by_hand(
        spread(tiny("deepseek_v3", n_group=1)), steps, family="deepseek_v3", scope="sequence", weights=WEIGHTS
    )
    check(module, module.ledger.take(), rules, wanted)
    biased, _ = module_of("deepseek_v3", raw={"scope": "sequence"}, n_group=1)
    for name, buffer in biased.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    step(biased, [], steps[0])
    means, _ = biased.ledger.means(biased.ledger.take(), torch.ones(()))
    assert means["router_balance"].item() == pytest.approx(wanted.balance, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_losses_of_devices(scope, padded):
    weights = WEIGHTS | {"device": 0.25, "communication": 0.75}
    raw = {
        "scope": scope,
        "device_weight": 0.25,
        "communication_weight": 0.75,
        "num_devices": 2,
        "devices_per_token": 2,
    }
    module, rules = module_of("mixtral", "full", raw=raw | {"scope": scope})
    steps = steps_of(1, 2, padded=padded)
    step(module, rules, steps[0])
    check(
        module,
        module.ledger.take(),
        rules,
        by_hand(plain("mixtral"), steps, scope=scope, weights=weights, devices=(2, 2)),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_two_passes_give_what_one_micro_batch_of_everything_does(padded):
    module, rules = module_of("mixtral", "full", raw={"estimator": "two_pass"})
    steps = steps_of(1, 3, padded=padded)
    before = torch.get_rng_state()
    step(module, rules, steps[0])
    assert torch.get_rng_state().equal(before)
    wanted = by_hand(plain("mixtral"), [[joined(steps[0])]], weights=WEIGHTS)
    check(module, module.ledger.take(), rules, wanted)


def test_a_warm_start_takes_what_is_to_come_from_the_last_step():
    module, rules = module_of("mixtral", raw={"estimator": "warm_start"})
    first, second = steps_of(1, 3), [[batch_of(seed) for seed in (7, 8, 9)]]
    step(module, rules, first[0])
    sums = module.ledger.take()
    wanted = by_hand(plain("mixtral"), first, weights=WEIGHTS)
    check(module, sums, rules, wanted)
    module.zero_grad()
    step(module, rules, second[0])
    after = by_hand(plain("mixtral"), second, last_counts=wanted.counts, weights=WEIGHTS)
    check(module, module.ledger.take(), rules, after)


def test_a_warm_start_goes_on_where_it_was_saved():
    module, rules = module_of("mixtral", raw={"estimator": "warm_start"})
    step(module, rules, steps_of(1, 2)[0])
    saved = {rule.name: rule.state_dict() for rule in rules}
    module.zero_grad()
    other, others = module_of("mixtral", raw={"estimator": "warm_start"})
    for rule in others:
        rule.load_state_dict(saved[rule.name])
    for one, its in ((module, rules), (other, others)):
        step(one, its, [batch_of(7), batch_of(8)])
    for name, parameter in module.named_parameters():
        assert parameter.grad.equal(other.get_parameter(name).grad), name


CASES = [
    {"scope": "global_batch", "estimator": "running"},
    {"scope": "global_batch", "estimator": "two_pass"},
    {"scope": "data_parallel"},
    {"scope": "sequence"},
]


def _on_a_rank() -> None:
    for raw in CASES:
        for padded in (False, True):
            module, rules = module_of("mixtral", "full", raw=raw)
            steps = steps_of(2, 2, padded=padded)
            everyone = [batch for rank in steps for batch in rank]
            step(module, rules, steps[dist.get_rank()], everyone=everyone, num_ranks=2)
            sums = module.ledger.take()
            for tensor in (sums, *(p.grad for p in module.parameters())):
                dist.all_reduce(tensor)
            for parameter in module.parameters():
                parameter.grad.div_(2)
            check(module, sums, rules, by_hand(plain("mixtral"), steps, weights=WEIGHTS, **raw))


def test_two_ranks():
    run_ranks(_on_a_rank, 2)


def test_the_global_loss_is_that_of_one_batch_however_it_is_shared_out():
    module, rules = module_of("mixtral")
    steps = steps_of(2, 1)
    step(module, rules, [joined([rank[0] for rank in steps])])
    shared_out = by_hand(plain("mixtral"), steps, weights=WEIGHTS)
    check(module, module.ledger.take(), rules, shared_out)
    of_each = by_hand(plain("mixtral"), steps, scope="micro_batch", weights=WEIGHTS)
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(of_each.gradients[router], shared_out.gradients[router], rtol=1e-3), "the scopes differ"


def test_layers_share_one_compiled_graph_and_count_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, rules = module_of("mixtral", "full")
    for block in module.model.model.layers:
        block.compile(backend="aot_eager")
    steps = steps_of(1, 2)
    step(module, rules, steps[0])
    check(module, module.ledger.take(), rules, by_hand(plain("mixtral"), steps, weights=WEIGHTS))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_equal_loads_cost_one_whatever_the_number_of_experts_a_token():
    for top_k in (1, 2, 4):
        module, rules = module_of("mixtral", num_experts_per_tok=top_k)
        for name, parameter in module.model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.data.zero_()
        step(module, rules, [batch_of(0)])
        means, _ = module.ledger.means(module.ledger.take(), torch.ones(()))
        assert means["router_balance"].item() == pytest.approx(1.0, abs=1e-6)


def test_transformers_own_loss_is_not_added_too():
    module, rules = module_of("mixtral", output_router_logits=True, router_aux_loss_coef=10.0)
    steps = steps_of(1, 1)
    step(module, rules, steps[0])
    check(module, module.ledger.take(), rules, by_hand(plain("mixtral"), steps, weights=WEIGHTS))


def test_eval_is_the_plain_model_and_counts_nothing():
    module, rules = module_of("olmoe")
    batch = batch_of(0)
    assert torch.equal(module.eval()(batch)["total"], TrainModule(spread(tiny("olmoe"))).eval()(batch)["total"])
    assert not module.ledger.take().any()
    assert last_counts(rules) is None


def test_a_dense_model_is_refused_at_installation():
    with pytest.raises(ConfigError, match="router.*mixtral"):
        install_techniques([RouterBalance()], tiny("llama"), context())


def test_a_second_entry_is_refused():
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([RouterBalance(), RouterBalance(weight=0.1)], tiny("mixtral"), context())


def test_an_entry_that_adds_nothing_is_refused():
    with pytest.raises(ValueError, match="weight: 0.01"):
        parse_technique({"type": "router_balance", "weight": 0, "z_weight": 0})
