"""Counts are those of the routers' own outputs, each token once; a step's are reduced together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.registry import parse_technique
from leanmill.core.sites import Sites
from leanmill.core.technique import Installation, TechniqueConfig
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.moe.loads.loads import Loads, loads_of
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, tiny
from tests.distributed import run_ranks
from tests.moe.batches import batch_of, counts_of, step


NUM_EXPERTS = 4


class Counted(TechniqueConfig):
    """Counts, and adds up one more number."""

    type: str = "counted"

    def install(self, sites: Sites, offered: Any) -> Installation:
        loads_of(sites, offered)
        return Installation()


def counted(mode: str = "none", family: str = "mixtral") -> tuple[TrainModule, Loads]:
    model, offered = tiny(family), context()
    installed = install_techniques([Counted(), Counted()], model, offered)
    assert [rule.name for rule in installed.step_rules] == ["router_loads"], "two techniques share one"
    apply_activation_checkpointing(model, mode)
    loads = installed.step_rules[0]
    assert isinstance(loads, Loads)
    return TrainModule(model, ledger=offered.ledger).train(), loads


def choices(batches: list[dict[str, Tensor]], family: str = "mixtral") -> Tensor:
    """[layers, E] of a plain model."""
    model = tiny(family)
    found: list[Tensor] = []
    for batch in batches:
        routed: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda *call, seen=routed: seen.append(call[-1][2]))
            for name, module in model.named_modules()
            if name.endswith("mlp.gate")
        ]
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        for hook in hooks:
            hook.remove()
        mask = batch.get("token_mask", torch.ones_like(batch["labels"], dtype=torch.bool)).flatten()
        found.append(torch.stack([torch.bincount(one[mask].flatten(), minlength=NUM_EXPERTS) for one in routed]))
    return torch.stack(found).sum(0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_each_token_counts_once(mode, padded):
    module, loads = counted(mode)
    batches = [batch_of(seed, padded=padded) for seed in (1, 2)]
    for _ in range(2):
        step(module, [loads], batches)
        wanted = choices(batches)
        assert counts_of(loads).view(2, -1).equal(wanted.double()), "and no step adds to another"
        num_tokens = sum(b["token_mask"].sum() if padded else b["labels"].numel() for b in batches)
        assert loads.num_tokens(loads.last_step).item() == num_tokens
        assert loads.num_micro_batches(loads.last_step).item() == 2
    module.eval()(batches[0])
    assert counts_of(loads).view(2, -1).equal(wanted.double())


def test_a_sum_has_a_name_of_its_own():
    _, loads = counted()
    loads.open("entropy/0", 1)
    with pytest.raises(ValueError, match="entropy/0"):
        loads.open("entropy/0", 1)


COLLECTIVES = [
    ({}, 1),
    ({"scope": "sequence"}, 1),
    ({"scope": "micro_batch"}, 1),
    ({"scope": "data_parallel"}, 3),
    ({"estimator": "running"}, 3),
    ({"estimator": "warm_start"}, 3),
    ({"estimator": "two_pass"}, 1),
]
"""Options of router_balance (none: only counted), and the reductions of a step of 3 micro-batches."""


def _count_collectives() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    reduce = dist.all_reduce
    seen: list[int] = []
    dist.all_reduce = lambda tensor, *args, **kwargs: (  # type: ignore[assignment]
        seen.append(tensor.numel() * tensor.element_size()),
        reduce(tensor, *args, **kwargs),
    )
    for options, _ in COLLECTIVES:
        config = parse_technique({"type": "router_balance"} | options) if options else Counted()
        model, offered = tiny("mixtral"), context()
        installed = install_techniques([config], model, offered)
        module = TrainModule(model, ledger=offered.ledger).train()
        batches = [batch_of(seed + 3 * dist.get_rank()) for seed in range(3)]
        seen.clear()
        step(module, installed.step_rules, batches, num_ranks=2)
        found.append((len(seen), max(seen)))
        loads = next(rule for rule in installed.step_rules if isinstance(rule, Loads))
        wanted = choices([batch_of(seed) for seed in range(6)])
        assert counts_of(loads).view(2, -1).equal(wanted.double()), "of both ranks"
    return found


def test_all_layers_are_reduced_together():
    for found in run_ranks(_count_collectives, 2):
        assert [calls for calls, _ in found] == [calls for _, calls in COLLECTIVES]
        assert {size for _, size in found} == {8 * (2 + 2 * NUM_EXPERTS)}, "fp64: tokens, micro-batches, two layers"
