"""STGC against its equations: plain code over all ranks, layer by layer from the last, autograd per parameter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.moe.stgc.config import Stgc
from leanmill.moe.stgc.conflicts import conflicts, elimination, gradient_sums
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import MIXTURES, context, install, tiny, tokens
from tests.distributed import run_ranks


WEIGHT, THRESHOLD = 0.5, 0.1


def batch_of(number):
    ids = tokens(2, 11, seed=number)
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[number % 2, :3] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(11).expand(2, -1).contiguous()}


def num_valid(count):
    return sum((batch_of(number)["labels"] != -100).sum() for number in range(count)).float()


def plain(family):
    model = tiny(family)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.mul_(20)
    return model


def module_of(family="mixtral", mode="none", scope="data_parallel"):
    model, offered = plain(family), context()
    rules = install_techniques([Stgc(weight=WEIGHT, threshold=THRESHOLD, scope=scope)], model, offered).step_rules
    for rule in rules:
        rule.check()
    apply_activation_checkpointing(model, mode)
    return TrainModule(model, ledger=offered.ledger).train()


def step(module, num_ranks, num_micro, rank=0):
    """What an engine does whose reductions average."""
    scale = num_ranks / num_valid(num_ranks * num_micro)
    module.ledger.begin_step(token_scale=scale, num_micro_batches=num_micro)
    for micro in range(num_micro):
        (module(batch_of(rank * num_micro + micro))["total"] * scale).backward()


def mixtures_of(model):
    """(module that returns the experts' output, router) by layer."""
    found = {}
    for layer, block in enumerate(model.model.layers):
        for name, router in block.mlp.named_modules():
            if name in ("gate", "router"):
                found[layer] = block.mlp, router
    return found


def run(model, batch, seen):
    """The loss; notes what routers decide and mixtures return by layer."""
    hooks = []
    for layer, (mixture, router) in mixtures_of(model).items():
        hooks += [
            router.register_forward_hook(lambda _, args, out, n=layer: seen["routed"].__setitem__(n, out[:3])),
            mixture.register_forward_hook(lambda _, args, out, n=layer: seen["mixed"].__setitem__(n, out)),
        ]
    logits = model(**{k: batch[k] for k in ("input_ids", "position_ids")}, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def copies(routed):
    """(token, place in its list, expert) of every copy."""
    experts = routed[2]
    return [(t, k, int(e)) for t, row in enumerate(experts) for k, e in enumerate(row)]


def conflicting(gradients, everyone, routed, gradient, num_experts):
    """Which copies of a rank have a cosine below the threshold with their expert's mean gradient."""
    by_expert = {expert: [] for expert in range(num_experts)}
    for other, decided in zip(gradients, everyone, strict=True):
        for token, place, expert in copies(decided):
            by_expert[expert].append(decided[1][token, place].detach() * other[token])
    found = []
    for token, place, expert in copies(routed):
        own, mean = routed[1][token, place].detach() * gradient[token], torch.stack(by_expert[expert]).mean(0)
        if own.any() and float(F.cosine_similarity(own, mean, dim=0)) < THRESHOLD:
            found.append((token, place, expert))
    return found


def by_hand(family, num_ranks, num_micro, scope="data_parallel"):
    """Gradients, mean loss, mean share of copies that conflict."""
    model = plain(family)
    objective, losses, shares = torch.zeros(()), [], []
    for micro in range(num_micro):
        seen = [{"routed": {}, "mixed": {}} for _ in range(num_ranks)]
        part = sum(run(model, batch_of(rank * num_micro + micro), seen[rank]) for rank in range(num_ranks))
        part = part / num_valid(num_ranks * num_micro)
        for layer in sorted(mixtures_of(model), reverse=True):
            mixed = [one["mixed"][layer] for one in seen]
            # What later layers add to the objective is a part of what reaches this one.
            gradients = [g.flatten(0, 1) for g in torch.autograd.grad(part, mixed, retain_graph=True)]
            routed = [one["routed"][layer] for one in seen]
            for rank in range(num_ranks):
                everyone = slice(None) if scope == "data_parallel" else slice(rank, rank + 1)
                logits = routed[rank][0].float()
                found = conflicting(
                    gradients[everyone], routed[everyone], routed[rank], gradients[rank], logits.shape[-1]
                )
                total = len(copies(routed[rank]))
                loss = sum((-(-logits[t]).log_softmax(-1)[e] for t, _, e in found), torch.zeros(())) / total
                part = part + WEIGHT * loss / (len(mixtures_of(model)) * num_ranks * num_micro)
                losses.append(float(loss.detach()))
                shares.append(len(found) / total)
        objective = objective + part
    objective.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, sum(losses) / len(losses), sum(shares) / len(shares)


def check(module, sums, wanted):
    gradients, loss, share = wanted
    assert 0.02 < share < 0.98
    for name, gradient in gradients.items():
        found = module.model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    means, weighted = module.ledger.means(sums, torch.ones(()))
    assert means["stgc"].item() == pytest.approx(loss, rel=1e-5)
    assert means["stgc_share"].item() == pytest.approx(share, rel=1e-6)
    assert weighted.item() == pytest.approx(WEIGHT * loss, rel=1e-5)


@pytest.mark.parametrize(("num_micro", "mode"), [(1, "none"), (1, "selective"), (2, "full")])
def test_one_backward_is_the_papers_loss_values_and_gradients(num_micro, mode):
    module = module_of(mode=mode)
    step(module, 1, num_micro)
    check(module, module.ledger.take(), by_hand("mixtral", 1, num_micro))


@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "mixtral"])
def test_families(family):
    module = module_of(family)
    step(module, 1, 1)
    check(module, module.ledger.take(), by_hand(family, 1, 1))


def _on_a_rank():
    for scope in ("data_parallel", "micro_batch"):
        module = module_of(mode="full", scope=scope)
        step(module, 2, 2, dist.get_rank())
        sums = module.ledger.take()
        for tensor in (sums, *(p.grad for p in module.parameters())):
            dist.all_reduce(tensor)
        for parameter in module.parameters():
            parameter.grad.div_(2)
        check(module, sums, by_hand("mixtral", 2, 2, scope))


def test_two_ranks():
    run_ranks(_on_a_rank, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_in_logits_is_autograds_with_empty_places_and_closed_experts(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator).to(dtype).float()
    logits[2, 4] = float("-inf")
    experts = torch.tensor([[0, 1], [2, 5], [3, 0], [4, 1], [5, 5], [1, 2], [0, 4]])
    is_conflict = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1], [0, 0], [0, 0], [1, 0]]).bool()
    loss, away = elimination(logits, experts, is_conflict)
    leaf = logits.clone().requires_grad_()
    expected = torch.zeros(())
    for token, place in is_conflict.nonzero().tolist():
        z = leaf[token][leaf[token].isfinite()]
        expected = expected + leaf[token, experts[token, place]] + (-z).logsumexp(0)
    expected = expected / 11
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(away, leaf.grad)
    assert not away[[4, 5]].any()


def test_what_has_no_gradient_or_no_expert_does_not_conflict():
    gradient = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 0.0], [1.0, 1.0]])
    weights, experts = torch.tensor([[1.0], [0.25], [0.5], [1.0]]), torch.tensor([[0], [0], [0], [2]])
    sums = gradient_sums(gradient, weights, experts, 2)
    torch.testing.assert_close(sums, torch.tensor([[0.75, 0.025], [0.0, 0.0]]))
    assert conflicts(gradient, weights, experts, sums, 0.5).flatten().tolist() == [False, True, False, False]


def test_eval_is_the_plain_model_and_notes_nothing():
    module, batch = module_of().eval(), batch_of(0)
    assert torch.equal(module(batch)["total"], TrainModule(plain("mixtral")).eval()(batch)["total"])
    assert not module.ledger.take().any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_do_the_same_and_share_one_graph_where_nothing_is_recomputed(mode):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = module_of(mode=mode)
    for block in module.model.model.layers:
        block.compile(backend="aot_eager")
    step(module, 1, 2)
    check(module, module.ledger.take(), by_hand("mixtral", 1, 2))
    if mode == "none":
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"router.*mixtral"):
        install_techniques([Stgc()], tiny("llama"), context())
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([Stgc(), Stgc(weight=0.1)], tiny("mixtral"), context())
    with pytest.raises(ConfigError, match=r"freezes it; remove stgc"):
        install(tiny("mixtral"), {"type": "stgc"}, {"type": "lora", "rank": 2, "alpha": 2, "targets": ["q_proj"]})
