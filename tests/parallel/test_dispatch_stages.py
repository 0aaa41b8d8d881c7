"""Masks, quantisers and adapters on the experts of this rank: a model's gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.experts import is_stacked_experts, set_dispatch
from leanmill.core.sites import iter_sites
from leanmill.parallel.dispatch import AllToAllDispatch
from tests.core.tiny import install, tiny, tokens
from tests.distributed import run_ranks
from tests.parallel.dispatch_cases import keep_own_experts


EXPERTS = {"targets": ["experts.*"]}
TECHNIQUES = {
    "nm_sparsity": [{"type": "nm_sparsity", **EXPERTS}],
    "ternary": [{"type": "ternary", **EXPERTS}],
    "quest": [{"type": "quest", **EXPERTS}],
    "lora and nm_sparsity": [{"type": "lora", "rank": 2, **EXPERTS}, {"type": "nm_sparsity", **EXPERTS}],
}


def staged(techniques):
    model = tiny("qwen3_moe", num_hidden_layers=1).train()
    install(model, *techniques)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "stages" in name and parameter.requires_grad:
                parameter.normal_(std=0.1)  # an adapter that starts at zero would hide mistakes
    return model


def gradients(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def spread_out(model, rank, num_ranks):
    """Leave this rank its experts, and what their stages hold of them."""
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            keep_own_experts(module, rank, num_ranks)
            set_dispatch(module, AllToAllDispatch(dist.group.WORLD, module.num_experts), name)
    for _, site in iter_sites(model):
        for stage in site.weight_stages():
            for name, parameter in list(stage.named_parameters()):
                own = parameter.detach().chunk(num_ranks)[rank].clone()
                setattr(stage, name, nn.Parameter(own, parameter.requires_grad))
    return model


@pytest.mark.parametrize("name", TECHNIQUES)
def test_gradients_of_every_weight(name):
    batches = [tokens(2, 7, seed=1), tokens(1, 7, seed=2)]

    def run():
        rank = dist.get_rank()
        return gradients(spread_out(staged(TECHNIQUES[name]), rank, 2), batches[rank])

    first, second = run_ranks(run, 2)
    for parameter, expected in gradients(staged(TECHNIQUES[name]), torch.cat(batches)).items():
        is_spread = "experts" in parameter
        parts = first[parameter], second[parameter]
        got = torch.cat(parts) if is_spread else sum(parts)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6, msg=lambda m, p=parameter: f"{p}: {m}")
