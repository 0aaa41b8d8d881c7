"""Router-Tuning against its equations: plain code on all micro-batches of all ranks, autograd per parameter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.moe.router_tuning.attention import SkippedAttention
from leanmill.moe.router_tuning.config import RouterTuning
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, tiny, tokens
from tests.distributed import run_ranks


LAYERS, TARGET, WEIGHT = 4, 0.2, 0.3


def batch_of(number):
    """Three rows of two documents each."""
    ids = tokens(3, 11, seed=number)
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[number % 3, :4] = -100
    positions = torch.arange(11).expand(3, -1).clone()
    for row in range(3):
        positions[row, 2 + 3 * row :] -= 2 + 3 * row
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def module_of(dtype=torch.float64, mode="none", family="llama"):
    model = tiny(family, num_hidden_layers=LAYERS).to(dtype).train()
    offered = context()
    config = RouterTuning(num_layers=2, target_capacity=TARGET, capacity_weight=WEIGHT)
    rule = install_techniques([config], model, offered).step_rules[0]
    generator = torch.Generator().manual_seed(3)
    for around in arounds_of(model).values():
        around.weight.data = torch.randn(1, 32, generator=generator).to(dtype)
    apply_activation_checkpointing(model, mode)
    return TrainModule(model, ledger=offered.ledger).train(), rule


def arounds_of(model):
    return {n: m for n, b in enumerate(model.model.layers) for m in b.modules() if isinstance(m, SkippedAttention)}


def num_valid(count):
    return sum((batch_of(number)["labels"] != -100).sum() for number in range(count)).float()


def forward_by_hand(model, batch):
    """(loss, decision of every token by layer): a row of documents at a time, attention within each."""
    arounds, decisions = arounds_of(model), {}
    hidden = model.model.embed_tokens(batch["input_ids"])
    for layer, block in enumerate(model.model.layers):
        out = []
        for x, positions in zip(hidden, batch["position_ids"], strict=True):
            starts = (positions == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(x)], strict=True):
                rows, own = x[start:end], positions[start:end]
                normed = block.input_layernorm(rows[None])
                mask = torch.full((len(rows), len(rows)), float("-inf"), dtype=x.dtype).triu(1)[None, None]
                angles = model.model.rotary_emb(rows[None], own[None])
                update = type(block.self_attn).forward(
                    block.self_attn, hidden_states=normed, position_embeddings=angles, attention_mask=mask
                )[0][0]
                if layer in arounds:
                    likely = torch.sigmoid(arounds[layer].weight[0] @ normed[0].mean(0))
                    run = (likely >= 0.5).to(x.dtype) + likely - likely.detach()
                    update = run * update
                    decisions.setdefault(layer, []).append(run.expand(len(rows)))
                after = rows + update
                out.append(after + block.mlp(block.post_attention_layernorm(after)[None])[0])
        hidden = torch.cat(out).view_as(hidden)
    logits = model.lm_head(model.model.norm(hidden))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
    return loss, {layer: torch.cat(parts) for layer, parts in decisions.items()}


def by_hand(num_ranks, num_micro):
    """Gradients of the objective, mean excess, and the share of tokens that attended by layer."""
    module, _ = module_of()
    objective, ran, excesses = torch.zeros((), dtype=torch.float64), {}, []
    for micro in range(num_micro):
        found = [forward_by_hand(module.model, batch_of(rank * num_micro + micro)) for rank in range(num_ranks)]
        objective = objective + sum(loss for loss, _ in found) / num_valid(num_ranks * num_micro)
        for layer in found[0][1]:
            ran.setdefault(layer, []).extend(decisions[layer] for _, decisions in found)
            share = torch.cat(ran[layer]).detach().mean()
            excesses.append(max(0.0, float(share) - TARGET))
            if share > TARGET:
                for _, decisions in found:
                    objective = objective + WEIGHT * decisions[layer].mean() / (num_ranks * num_micro)
    objective.backward()
    gradients = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
    shares = {layer: float(torch.cat(parts).detach().mean()) for layer, parts in ran.items()}
    return gradients, sum(excesses) / len(excesses), shares


def step(module, rule, num_ranks, num_micro, rank=0):
    """What an engine does whose reductions average."""
    scale = num_ranks / num_valid(num_ranks * num_micro)
    module.ledger.begin_step(token_scale=scale, num_micro_batches=num_micro)
    rule.begin_step(StepContext(step=0, num_steps=1, num_micro_batches=num_micro))
    for micro in range(num_micro):
        (module(batch_of(rank * num_micro + micro))["total"] * scale).backward()


def check(module, rule, sums, wanted):
    gradients, excess, shares = wanted
    assert gradients.keys() == {name for name, p in module.model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        found = module.model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    means, weighted = module.ledger.means(sums, torch.ones(()))
    assert means["router_tuning"].item() == pytest.approx(excess, rel=1e-5)
    assert weighted.item() == pytest.approx(2 * WEIGHT * excess, rel=1e-5)
    assert rule.metrics() == pytest.approx(
        {"capacity": sum(shares.values()) / 2} | {f"capacity/{layer}": share for layer, share in shares.items()}
    )


@pytest.mark.parametrize(("num_micro", "mode"), [(1, "none"), (3, "full")])
def test_values_and_gradients_are_the_papers(num_micro, mode):
    module, rule = module_of(mode=mode)
    step(module, rule, 1, num_micro)
    wanted = by_hand(1, num_micro)
    assert list(wanted[2]) == [1, 2]
    assert any(0 < share < 1 for share in wanted[2].values()), "some skip and some attend"
    assert wanted[1] > 0
    check(module, rule, module.ledger.take(), wanted)


def _on_a_rank():
    module, rule = module_of()
    step(module, rule, 2, 2, dist.get_rank())
    sums = module.ledger.take()
    for tensor in (sums, *(p.grad for p in module.parameters() if p.grad is not None)):
        dist.all_reduce(tensor)
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(2)
    check(module, rule, sums, by_hand(2, 2))


def test_two_ranks_count_together():
    run_ranks(_on_a_rank, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_decide_alike(dtype):
    module, rule = module_of(dtype)
    step(module, rule, 1, 1)
    assert rule.metrics()["capacity"] == pytest.approx(sum(by_hand(1, 1)[2].values()) / 2)
    assert all(around.weight.grad.dtype == dtype for around in arounds_of(module.model).values())


def test_it_begins_as_the_model_was_and_evaluates_what_it_trains():
    batch, plain = batch_of(0), tiny(num_hidden_layers=LAYERS)
    module, _ = module_of(torch.float32)
    trained = module(batch)["cross_entropy"]
    module.ledger.take()
    torch.testing.assert_close(module.eval()(batch)["cross_entropy"], trained)
    assert not module.ledger.take().any()
    for around in arounds_of(module.model).values():
        around.reset_parameters()
    assert torch.equal(module(batch)["cross_entropy"], TrainModule(plain).eval()(batch)["cross_entropy"])


def test_attention_is_not_computed_for_rows_that_skip_it():
    module, _ = module_of(torch.float32)
    model, batch = module.model.eval(), {"input_ids": tokens(3, 11), "use_cache": False}
    wanted = model.train()(**batch).logits
    called = []
    for layer, around in arounds_of(model).items():
        model.model.layers[layer].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args, layer=layer: called.append((layer, len(args[0])))
        )
        around.seen = []
        around.register_forward_pre_hook(lambda around, args, kwargs: around.seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, wanted, rtol=1e-5, atol=1e-6)
    attends = {
        layer: around._decide(around.seen[0]["hidden_states"], around.seen[0].get("position_ids")).any(-1)
        for layer, around in arounds_of(model).items()
    }
    assert called == [(layer, int(rows.sum())) for layer, rows in attends.items() if rows.any()]
    assert any(0 < rows.sum() < 3 for rows in attends.values())
    # Whole batches that skip: nothing is called, once it is known what attention returns.
    for around in arounds_of(model).values():
        around._decide = lambda hidden, positions: hidden.new_zeros(hidden.shape[:2])
    for _ in range(2):
        called.clear()
        with torch.no_grad():
            found = model(**batch).logits
    assert called == []
    assert torch.equal(found, model(**batch).logits)
    # Kept keys and values are those of all rows.
    model(input_ids=batch["input_ids"], use_cache=True)
    assert called == [(1, 3), (2, 3)]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_other_families_train(family):
    module, rule = module_of(torch.float32, family=family)
    step(module, rule, 1, 1)
    assert all(around.weight.grad.abs().sum() > 0 for around in arounds_of(module.model).values())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="set num_layers: 1 or less"):
        install_techniques([RouterTuning()], tiny(), context())
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([RouterTuning(num_layers=1)] * 2, tiny(), context())
    from leanmill.export.folding import fold

    with pytest.raises(ConfigError, match="beside the model it was trained on"):
        fold(module_of(torch.float32)[0].model)
