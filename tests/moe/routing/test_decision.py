"""Routers whose decision is made here, against transformers' own, and what readers are shown of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanmill.core.errors import RunError
from leanmill.core.ledger import Ledger
from leanmill.core.places import find_modules
from leanmill.core.sites import Sites
from leanmill.moe.routing.decision import Reader, Routing
from leanmill.moe.routing.install import decision_of, decisions
from leanmill.moe.routing.policy import affinities
from tests.core.tiny import tiny, tokens


FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "minimax_m2")


class Seen(Reader):
    technique = "seen"

    def __init__(self) -> None:
        super().__init__()
        self.routings: list[Routing] = []

    def forward(self, routing: Routing) -> Tensor:
        self.routings.append(routing)
        return routing.weights


def spread(model: nn.Module) -> nn.Module:
    """Scale routers up, and give correction biases values, so that choices differ."""
    for _, _, router in find_modules(model, "router"):
        router.weight.data.mul_(20)
    for name, bias in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            bias.normal_(std=0.1)
    return model


def decided(family: str, **changes: object) -> tuple[nn.Module, list[Seen], Ledger]:
    model, ledger = spread(tiny(family, **changes)), Ledger()
    readers = []
    for _, decision in decisions(Sites(model), ledger):
        decision.tell(reader := Seen())
        readers.append(reader)
    return model.train(), readers, ledger


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_own(family):
    expected = gradients(spread(tiny(family)).train(), tokens())
    model, readers, _ = decided(family)
    found = gradients(model, tokens())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert all(len(reader.routings) == 1 for reader in readers)
    model.eval()
    assert torch.equal(model(tokens()).logits, spread(tiny(family)).eval()(tokens()).logits)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_readers_are_shown_what_losses_need(family, is_training):
    model, readers, ledger = decided(family)
    ids = tokens(3, 5)
    ledger.begin_forward({"input_ids": ids})
    router = next(find_modules(model, "router"))[2]
    output = []
    router.register_forward_hook(lambda *call: output.extend(call[-1]))
    model.train(is_training)(ids)
    seen = readers[0].routings[0]
    logits, weights, experts = output
    assert logits is seen.logits
    assert weights is seen.weights
    assert experts is seen.experts
    assert seen.is_kept is None
    assert seen.token_mask is None
    by_sequence = F.one_hot(experts, 4).sum(1).view(3, 5, 4)
    share = affinities(logits, decision_of(router).policy.score).view(3, 5, 4)
    if not is_training:
        by_sequence, share = by_sequence.view(1, 15, 4), share.view(1, 15, 4)
    assert torch.equal(seen.counts, by_sequence.sum(1))
    torch.testing.assert_close(seen.mean_probability, share.mean(1))
    torch.testing.assert_close(seen.z_loss, logits.logsumexp(-1).square().mean())


@pytest.mark.parametrize("is_ours", [False, True])
def test_masked_tokens_are_not_routed_and_count_nowhere(is_ours):
    model, readers, ledger = decided("mixtral")
    if is_ours:
        Sites(model).select(["gate_up_proj"])
    ids, mask = tokens(3, 5), torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:], mask[2] = False, False
    expected = spread(tiny("mixtral"))(ids).logits
    ledger.begin_forward({"input_ids": ids, "token_mask": mask})
    found = model(ids).logits
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()
    seen, real = readers[0].routings[0], mask.flatten()
    assert (seen.experts[~real] == 4).all()
    assert not seen.weights[~real].any()
    assert torch.equal(seen.counts, F.one_hot(seen.experts, 5).sum(1).view(3, 5, 5).sum(1)[:, :4])
    assert seen.counts.sum(-1).tolist() == [6, 10, 0]
    share = affinities(seen.logits, "softmax").view(3, 5, 4)
    torch.testing.assert_close(seen.mean_probability[0], share[0, :3].mean(0))
    torch.testing.assert_close(seen.mean_probability[1], share[1].mean(0))
    torch.testing.assert_close(seen.z_loss, seen.logits.logsumexp(-1).square()[real].mean())
    assert not seen.mean_probability[2].any()
    with pytest.raises(RunError, match="10 of .* 15 tokens.*long_documents: split"):
        model(ids[:2])


def test_bf16_models_decide_in_fp32_also_inside_of_autocast():
    for dtype, is_autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model, readers, _ = decided("qwen3_moe")
        router = next(find_modules(model, "router"))[2]
        inputs = []
        router.register_forward_pre_hook(lambda module, args, into=inputs: into.append(args[0]))
        model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            loss = model(tokens()).logits.float().square().sum()
        loss.backward()
        seen = readers[0].routings[0]
        assert seen.logits.dtype == seen.weights.dtype == torch.float32
        hidden = inputs[0].float().reshape(-1, 32)
        torch.testing.assert_close(seen.logits, hidden @ router.weight.float().t(), rtol=1e-6, atol=1e-5)
        assert router.weight.grad.dtype == dtype
        assert router.weight.grad.any()


def test_a_second_asker_gets_the_same_decisions():
    model, _, ledger = decided("olmoe")
    again = decisions(Sites(model), ledger)
    assert [decision_of(place.module) for place, _ in again] == [decision for _, decision in again]
    assert len(ledger._before_forward) == 1
    assert len({id(decision.tokens) for _, decision in again}) == 1
