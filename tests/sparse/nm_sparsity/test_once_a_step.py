"""SR-STE's decay counts once in an optimizer step, however often the weight is used in it."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import nn

from leanmill.core.rules import StepContext
from leanmill.core.site import LinearSite
from leanmill.core.sites import iter_sites
from leanmill.kernels.nm_mask.naive import nm_mask_by_sort
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.compile import compile_blocks
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import SingleEngine
from leanmill.parallel.engine import Preparation
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from leanmill.trainer.loss_paths import FromLogits
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import install, tiny, tokens
from tests.parallel.cases import ranks_here


LR, DECAY = 0.5, 0.1
MASKS = {"type": "nm_sparsity", "decay": DECAY, "targets": ["*_proj", "lm_head"]}
USES = {
    "one use": {},
    "micro-batches": {"num_micro_batches": 3},
    "head in chunks": {"chunk_tokens": 7},
    "block used twice": {"reuses_block": True},
    "recomputed": {"recomputes": True},
    "compiled": {"compiles": True},
    "all but compiled": {"num_micro_batches": 2, "chunk_tokens": 7, "reuses_block": True, "recomputes": True},
}


def step(
    *techniques,
    num_micro_batches=1,
    chunk_tokens=1000,
    reuses_block=False,
    recomputes=False,
    compiles=False,
    num_steps=1,
    first_step=0,
    run_steps=None,
    start=None,
):
    """Return the model after SGD steps, in fp64 through the real train module and engine.

    `run_steps` is the length of the run that they are part of, and `start` a model whose weights it starts from.
    """
    model = tiny().double()
    if reuses_block:
        model.model.layers[1] = model.model.layers[0]
    rules = install(model, *techniques).step_rules
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    if start is not None:
        model.load_state_dict(start.state_dict())
    apply_activation_checkpointing(model, "full" if recomputes else "none")
    if compiles:
        compile_blocks(model)
    module = TrainModule(model, chunk_tokens=chunk_tokens)
    # Chunks are for heads and terms that cannot be fused.
    module._paths = dict.fromkeys((False, True), FromLogits(model, chunk_tokens))
    engine, _ = build_engine(SingleEngine(), ranks=ranks_here(), precision="fp32", model_bytes=0)

    def sgd(live):
        return torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=LR)

    preparation = Preparation(
        materialise=lambda _: None, make_optimizer=sgd, num_micro_batches=num_micro_batches, max_grad_norm=None
    )
    engine.prepare(module.train(), preparation)
    for index in range(first_step, first_step + num_steps):
        for rule in rules:
            rule.begin_step(
                StepContext(step=index, num_steps=run_steps or num_steps, num_micro_batches=num_micro_batches)
            )
        batches = [_batch(seed=10 * index + part) for part in range(num_micro_batches)]
        engine.forward_backward(batches, torch.tensor(20.0))
        engine.step(torch.tensor(False))
    return model


def _batch(seed):
    ids = tokens(seed=seed)
    return {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": torch.arange(13).expand_as(ids).contiguous()}


@pytest.mark.parametrize("use", [pytest.param(u, marks=pytest.mark.slow if u == "compiled" else ()) for u in USES])
def test_the_update_is_the_papers(use, monkeypatch):
    # What a graph does with the buffer is the matter here; C++ for it takes long.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    start = {name: site.raw_weight.detach() for name, site in iter_sites(step(MASKS, num_steps=0, **USES[use]))}
    plain = dict(iter_sites(step(MASKS | {"gradient": "straight_through"}, **USES[use])))
    for name, site in iter_sites(step(MASKS, **USES[use])):
        weight = start[name]
        gradient = (weight - plain[name].raw_weight) / LR
        pruned = ~nm_mask_by_sort(weight, 2, 4)
        expected = weight - LR * (gradient + DECAY * weight * pruned)
        assert (site.raw_weight - expected).abs().max() < 1e-15, name


def test_every_step_decays():
    model = step(MASKS)
    first = dict(iter_sites(model))
    plain = dict(iter_sites(step(MASKS | {"gradient": "straight_through"}, start=model, first_step=1)))
    for name, site in iter_sites(step(MASKS, num_steps=2)):
        weight = first[name].raw_weight.detach()
        pruned = ~nm_mask_by_sort(weight, 2, 4)
        expected = plain[name].raw_weight - LR * DECAY * weight * pruned
        assert (site.raw_weight - expected).abs().max() < 1e-15, name


@pytest.mark.slow
def test_a_compiled_block_used_twice():
    block = nn.Sequential(LinearSite.adopt(nn.Linear(16, 16, bias=False), "up"), nn.ReLU())
    site, inputs = block[0], torch.randn(3, 16)
    site.put(NMSparsityStage(2, 4, DECAY))
    compiled = torch.compile(block, fullgraph=True)

    def gradient(function, decay):
        site.weight.grad = None
        site.stages["mask"].decay_left.fill_(decay)
        for _ in range(2):
            function(function(inputs)).sum().backward()
        return site.weight.grad.clone()

    weight = site.weight.detach()
    expected = gradient(block, 0.0) + DECAY * weight * ~nm_mask_by_sort(weight, 2, 4)
    torch.testing.assert_close(gradient(compiled, DECAY), expected)


@pytest.mark.parametrize("use", ["one use", "all but compiled"])
def test_inside_adapters_it_is_that_of_the_merged_weight(use):
    techniques = [MASKS, {"type": "lora", "rank": 2, "alpha": 4, "targets": ["*_proj"]}]
    start = dict(iter_sites(step(*techniques, num_steps=0, **USES[use])))
    plain = dict(iter_sites(step(MASKS | {"gradient": "straight_through"}, techniques[1], **USES[use])))
    for name, site in iter_sites(step(*techniques, **USES[use])):
        if name == "lm_head":
            continue
        delta = start[name].stages["delta"]
        merged = delta(start[name].raw_weight).detach()
        decay = DECAY * merged * ~nm_mask_by_sort(merged, 2, 4)
        got = plain[name].stages["delta"].lora_A - site.stages["delta"].lora_A
        assert (got - LR * delta.scaling * delta.lora_B.T @ decay).abs().max() < 1e-14, name
