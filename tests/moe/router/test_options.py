"""Options of routers against their definitions, token by token, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.places import find_modules
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.export.folding import fold
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.moe.router.capacity import kept
from leanmill.moe.router.expert_choice import taken
from leanmill.moe.router.mask_moe import draw_visible, frequent
from leanmill.moe.routing.decision import Reader, Routing
from leanmill.moe.routing.install import decision_of
from leanmill.parallel.naming import state_buffers
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import VOCAB_SIZE, context, tiny


class Seen(Reader):
    technique = "seen"

    def forward(self, routing: Routing) -> Tensor:
        self.__dict__["routing"] = routing
        return routing.weights


def batch_of(seed: int = 0, rows: int = 4, length: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB_SIZE, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, -1).contiguous()
    first = seed * rows
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "row_ids": torch.arange(first, first + rows)}


def module_of(family: str = "mixtral", *, mode: str = "none", **options: object) -> tuple[TrainModule, Seen, list]:
    model = tiny(family)
    for _, _, router in find_modules(model, "router"):
        router.weight.data.mul_(20)
    offered = context()
    installed = install_techniques([parse_technique({"type": "router", **options})], model, offered)
    seen = Seen()
    decision_of(next(find_modules(model, "router"))[2]).tell(seen)
    apply_activation_checkpointing(model, mode)
    return TrainModule(model, ledger=offered.ledger).train(), seen, installed.step_rules


def begin(rules: list, step: int = 0) -> None:
    for rule in rules:
        rule.begin_step(StepContext(step=step, num_steps=9, num_micro_batches=1))


def outputs_of(module: TrainModule) -> list[tuple[Tensor, ...]]:
    found = []
    router = next(find_modules(module.model, "router"))[2]
    router.register_forward_hook(lambda *call: found.append(call[-1]))
    return found


@pytest.mark.parametrize("drop", ["probability", "position"])
@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
def test_capacity(drop, over):
    module, seen, _ = module_of(capacity_factor=0.75, drop=drop, capacity_over=over)
    found = outputs_of(module)
    module(batch_of())
    routing: Routing = seen.routing
    shares = routing.logits.softmax(-1)
    length = 11 if over == "sequence" else 44
    room = math.ceil(0.75 * 2 * length / 4)
    expected = torch.zeros(44, 2, dtype=torch.bool)
    for first in range(0, 44, length):
        for expert in range(4):
            copies = [(t, k) for t in range(first, first + length) for k in range(2) if routing.experts[t, k] == expert]
            if drop == "probability":
                copies.sort(key=lambda copy: -shares[copy[0], expert].item())
            for copy in copies[:room]:
                expected[copy] = True
    assert 0 < expected.sum() < 88
    assert torch.equal(routing.is_kept, expected)
    _, weights, experts = found[0]
    assert torch.equal(experts, routing.experts.masked_fill(~expected, 4)), "what experts are sent"
    best = routing.logits.gather(1, routing.experts).softmax(-1)
    torch.testing.assert_close(weights, best * expected)
    assert routing.counts.sum() == 88, "counts are those of the choice"


def test_capacity_is_there_in_training_only_and_what_is_dropped_is_not_computed():
    module, seen, _ = module_of(capacity_factor=0.5, drop="position")
    batch = batch_of()
    plain = TrainModule(tiny_with(module)).eval()
    torch.testing.assert_close(module.eval()(batch)["total"], plain(batch)["total"], rtol=1e-5, atol=1e-5)
    assert seen.routing.is_kept is None
    module.train()(batch)["total"].backward()
    block = module.model.model.layers[0].mlp
    inputs = torch.randn(1, 44, 32, requires_grad=True)
    out = block(inputs)
    dropped = ~seen.routing.is_kept.any(-1)
    assert dropped.any()
    assert not out[0, dropped].any()
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs)
    assert not gradient[0, dropped].any()


def test_experts_that_know_no_empty_places_get_weights_of_zero():
    module, seen, _ = module_of("gpt_oss", capacity_factor=0.5)
    found = outputs_of(module)
    module(batch_of())["total"].backward()
    _, weights, experts = found[0]
    dropped = ~seen.routing.is_kept
    assert dropped.any()
    assert experts.max() < 4
    assert not weights[dropped].any()
    assert weights[~dropped].all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def tiny_with(module: TrainModule) -> nn.Module:
    model = tiny("mixtral")
    model.load_state_dict({k: v for k, v in module.model.state_dict().items() if ".around." not in k})
    return model


def test_ties_drop_the_later_copy_and_empty_places_are_no_copies():
    experts = torch.tensor([[0, 1], [0, 2], [0, 2], [1, 0]])
    room = torch.tensor([2.0])
    expected = [[True, True], [True, True], [False, True], [True, False]]
    assert kept(experts, 2, None, room).tolist() == expected
    assert kept(experts, 2, torch.ones(4, 2), room).tolist() == expected
    assert kept(experts[:0], 2, None, room).shape == (0, 2)


def test_experts_choose_tokens():
    module, seen, _ = module_of(expert_choice={"experts_a_token": 1.5, "at_most": 3})
    found = outputs_of(module)
    module(batch_of())
    logits, weights, experts = found[0]
    shares = logits.softmax(-1)
    room = math.ceil(11 * 1.5 / 4)
    chosen = [[] for _ in range(44)]
    for first in range(0, 44, 11):
        for expert in range(4):
            order = sorted(range(first, first + 11), key=lambda t: -shares[t, expert].item())
            for token in order[:room]:
                chosen[token].append(expert)
    assert {len(some) for some in chosen} > {1, 2}
    for token, some in enumerate(chosen):
        best = sorted(some, key=lambda e: -shares[token, e].item())[:3]
        assert experts[token].tolist() == best + [4] * (3 - len(best))
        torch.testing.assert_close(weights[token, : len(best)], shares[token, best])
        assert not weights[token, len(best) :].any()
    counts = F.one_hot(experts, 5).sum(1).view(4, 11, 5).sum(1)[:, :4]
    assert torch.equal(seen.routing.counts, counts)
    upstream = torch.randn_like(weights)
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), logits, retain_graph=True)
    leaf = logits.detach().requires_grad_()
    picked = leaf.softmax(-1).gather(1, experts.clamp(max=3)).masked_fill(experts == 4, 0)
    torch.testing.assert_close(gradient, torch.autograd.grad((picked * upstream).sum(), leaf)[0])


def test_experts_choose_no_padding():
    shares, mask = torch.rand(12, 3), torch.ones(12, dtype=torch.bool)
    mask[3:6] = False
    found = taken(shares, mask, 2.0, 2)
    assert not found[3:6].any()
    assert found[:6].sum(0).tolist() == [2] * 3
    assert found[6:].sum(0).tolist() == [4] * 3


def counts_file(folder, **changes: int) -> str:
    counts = np.ones(VOCAB_SIZE, dtype=np.int64)
    counts[:10] = 100
    np.save(folder / "counts.npy", counts)
    return str(folder / "counts.npy")


@pytest.mark.parametrize("is_training", [False, True])
def test_tokens_see_the_experts_that_were_drawn_for_them(tmp_path, is_training):
    options = {"counts": counts_file(tmp_path), "frequent_share": 0.9, "visible_experts": 3}
    module, seen, _ = module_of(mask_moe=options)
    batch = batch_of()
    module.train(is_training)(batch)
    routing, ids = seen.routing, batch["input_ids"].flatten()
    router = next(find_modules(module.model, "router"))[2]
    visible = decision_of(router).options["mask_moe"].visible
    assert torch.equal(visible.sum(-1), torch.where(torch.arange(VOCAB_SIZE) < 10, 3, 1))
    hidden = routing.logits.masked_fill(~visible[ids], -torch.inf)
    assert torch.equal(hidden, routing.logits)
    for token in range(44):
        open_experts = visible[ids[token]].nonzero().flatten().tolist()
        best = sorted(open_experts, key=lambda e: -routing.logits[token, e].item())[:2]
        assert routing.experts[token].tolist() == best + [4] * (2 - len(best))
        expected = routing.logits[token, best].softmax(-1)
        torch.testing.assert_close(routing.weights[token, : len(best)], expected)
    assert any("visible" in name for name, _ in state_buffers(module.model)), "it goes into checkpoints"
    if is_training:
        module(batch)["total"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_masks_are_drawn_evenly_and_for_each_router_anew():
    is_frequent = torch.arange(4000) < 2000
    one, other = (draw_visible(is_frequent, 8, 3, seed=1, name=name) for name in ("a", "b"))
    assert torch.equal(one, draw_visible(is_frequent, 8, 3, seed=1, name="a"))
    assert not torch.equal(one, other)
    assert one[:2000].sum(-1).unique().tolist() == [3]
    assert one[2000:].sum(-1).unique().tolist() == [1]
    assert ((one[:2000].float().mean(0) - 3 / 8).abs() < 0.05).all()
    assert frequent(torch.tensor([5, 1, 3, 1]), 0.8).tolist() == [True, False, True, False]
    assert frequent(torch.tensor([5, 1, 3, 1]), 0.81).tolist() == [True, True, True, False]


@pytest.mark.parametrize("score", ["best", "best_two"])
def test_groups(score):
    module, seen, _ = module_of("qwen3_moe", groups={"num_groups": 2, "open_groups": 1, "score": score})
    for is_training in (True, False):
        module.train(is_training)(batch_of())
        routing = seen.routing
        scores = routing.logits.softmax(-1).view(44, 2, 2)
        value = scores.sum(-1) if score == "best_two" else scores.amax(-1)
        best = value.argmax(-1, keepdim=True)
        assert torch.equal(routing.experts // 2, best.expand(-1, 2))


def test_jitter_is_of_the_router_alone_and_the_same_in_recomputation():
    gradients = []
    for mode in ("none", "full"):
        module, seen, rules = module_of(jitter=0.1, mode=mode)
        router = next(find_modules(module.model, "router"))[2]
        inputs = []
        router.register_forward_pre_hook(lambda module, args, into=inputs: into.append(args[0].detach().clone()))
        begin(rules)
        batch = batch_of(seed=3)
        module(batch)["total"].backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    plain = inputs[0].reshape(-1, 32)
    factors = torch.linalg.lstsq(router.weight, seen.routing.logits.detach().t()).solution.t()
    assert factors.shape == plain.shape
    assert not torch.allclose(seen.routing.logits, plain @ router.weight.t(), rtol=1e-3)
    assert torch.allclose(seen.routing.logits, plain @ router.weight.t(), atol=0.1 * 32**0.5 * 3)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_jitter_draws_by_row_and_step_and_not_in_evaluation():
    module, _, rules = module_of(jitter=0.25)
    option = decision_of(next(find_modules(module.model, "router"))[2]).options["jitter"]
    tokens = decision_of(next(find_modules(module.model, "router"))[2]).tokens
    begin(rules)
    ones, batch = torch.ones(44, 32), batch_of()
    tokens.begin_forward(batch)
    whole = option.on_hidden(ones, tokens)
    assert whole.min() >= 0.75
    assert whole.max() <= 1.25
    assert whole.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.1)
    assert torch.equal(ones, torch.ones(44, 32)), "never in place"
    tokens.begin_forward({name: value[2:] for name, value in batch.items()})
    assert torch.equal(option.on_hidden(ones[22:], tokens), whole[22:]), "half of the rows on another rank"
    begin(rules, step=1)
    assert not torch.equal(option.on_hidden(ones[22:], tokens), whole[22:])
    option.eval()
    assert torch.equal(option.on_hidden(ones, tokens), ones)
    option.train()
    tokens.row_ids = None
    with pytest.raises(RunError, match="which rows"):
        option.on_hidden(ones, tokens)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"jitter": 0.1, "capacity_factor": 1.0}, None),
        ({"expert_choice": {}}, "expert_choice"),
        ({"groups": {"num_groups": 2, "open_groups": 1}}, "groups"),
    ],
)
def test_an_export_that_would_be_another_model_is_refused(options, refused):
    module, _, _ = module_of(**options)
    if refused is None:
        fold(module.model)
        assert not any(".around." in name for name in module.model.state_dict())
    else:
        with pytest.raises(ConfigError, match=rf"gate.*router\.{refused}.*leanmill eval"):
            fold(module.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0}, "capacity_factor"),
        ({"drop": "position"}, "set capacity_factor"),
        ({"capacity_factor": 1.0, "expert_choice": {}}, "remove one"),
        ({"groups": {"num_groups": 2, "open_groups": 2}}, "limits nothing"),
        ({"groups": {"num_groups": 3, "open_groups": 1}}, r"3 groups do not divide 4 experts; allowed: \[1, 2, 4\]"),
        ({"groups": {"num_groups": 4, "open_groups": 1}}, "top_k 2; allowed: 2 to 4"),
        ({"expert_choice": {"experts_a_token": 5}}, "experts_a_token <= at_most <= 4"),
        ({"mask_moe": {"counts": "/no/such/file.npy"}}, "numpy.bincount"),
    ],
)
def test_bad_options_are_refused_with_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        module_of(**options)


def test_counts_of_another_vocabulary_are_refused(tmp_path):
    path = str(tmp_path / "counts.npy")
    for counts, message in ((np.ones(7, int), "61 tokens"), (np.zeros(61, int), "counts nothing"), (np.ones(61), "61")):
        np.save(path, counts)
        with pytest.raises(ConfigError, match=message):
            module_of(mask_moe={"counts": path, "visible_experts": 2})
    with pytest.raises(ConfigError, match="8 visible experts of 4"):
        module_of(mask_moe={"counts": counts_file(tmp_path)})


def test_routers_that_limit_tokens_already_and_second_entries_are_refused():
    with pytest.raises(ConfigError, match=r"1 of 2 groups already.*n_group"):
        module_of("deepseek_v3", groups={"num_groups": 2, "open_groups": 1})
    entry = parse_technique({"type": "router", "jitter": 0.1})
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([entry, entry], tiny("mixtral"), context())


def test_options_compile_whole_and_layers_share_one_graph(tmp_path):
    options = {
        "jitter": 0.1,
        "capacity_factor": 0.75,
        "groups": {"num_groups": 2, "open_groups": 1},
        "mask_moe": {"counts": counts_file(tmp_path), "visible_experts": 3},
    }
    gradients = []
    for is_compiled in (False, True):
        module, _, rules = module_of(mode="full", **options)
        for _, _, router in find_modules(module.model, "router"):
            decision_of(router).readers = nn.ModuleDict()
        if is_compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            for block in module.model.model.layers:
                block.compile(backend="aot_eager")
        begin(rules)
        module(batch_of())["total"].backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
