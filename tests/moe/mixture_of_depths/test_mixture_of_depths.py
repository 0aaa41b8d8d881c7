"""Mixture of depths against its equations: plain code a row at a time, autograd per parameter."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.registry import parse_technique
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.moe.mixture_of_depths.around import RoutedBlock
from leanmill.moe.mixture_of_depths.choice import Choice, cut_mask
from leanmill.moe.mixture_of_depths.config import MixtureOfDepths
from leanmill.moe.mixture_of_depths.router import DepthRouter
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, tiny, tokens


LAYERS = 5
METHODS = {
    "gamma": {"layers": [1, 3], "capacity": 0.5},
    "own routers": {"layers": [0, 2, 4], "shared_router": False, "capacity": 0.3, "router_loss_weight": 0.1},
    "protected": {"layers": [1, 3], "protect": "labels", "capacity": 0.4, "router_loss_weight": 0.1},
    "p": {"method": "p_mod"},
    "p by layer": {"method": "p_mod", "layers": [1, 2, 4], "capacity": 0.4, "weight_scale": 0.5},
}


def batch_of(num_rows=3, length=13):
    """Rows of two documents each, of different lengths; different numbers of labels."""
    ids = tokens(num_rows, length)
    labels = ids.roll(-1, 1)
    positions = torch.arange(length).expand(num_rows, -1).clone()
    for row in range(num_rows):
        labels[row, : 4 + 3 * row] = -100
        cut = 3 + 4 * (row % 2)
        positions[row, cut:] -= cut
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def module_of(family="llama", *, mode="none", dtype=torch.float64, attention="eager", **fields):
    model = tiny(family, num_hidden_layers=LAYERS).to(dtype).train()
    model.set_attn_implementation(attention)
    offered = context()
    install_techniques([MixtureOfDepths(**fields)], model, offered)
    generator = torch.Generator().manual_seed(2)
    for router in (m for m in model.modules() if isinstance(m, DepthRouter)):
        for parameter in router.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
            parameter.data = drawn.to(dtype)
    apply_activation_checkpointing(model, mode)
    module = TrainModule(model, ledger=offered.ledger).train()
    offered.ledger.begin_step(token_scale=torch.tensor(1.0), num_micro_batches=1)
    return module


def routed_blocks(model):
    return {n: m for n, b in enumerate(model.model.layers) for m in b.modules() if isinstance(m, RoutedBlock)}


def run_block(model, block, rows, positions, documents):
    """A block on the tokens `rows` [N, H] of one row."""
    angles = model.model.rotary_emb(rows[None], positions[None])
    sees = (documents[:, None] == documents) & torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape, dtype=rows.dtype).masked_fill(~sees, float("-inf"))[None, None]
    normed = block.input_layernorm(rows[None])
    after = rows + block.self_attn(hidden_states=normed, position_embeddings=angles, attention_mask=mask)[0][0]
    return after + block.mlp(block.post_attention_layernorm(after)[None])[0]


def decide(around, x, protected):
    """(logits, weight, chosen places) of one row, from the papers' formulas."""
    router = around.router
    if router.weighing == "softmax":
        logits = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ router.weight.T
        weight, order = logits.softmax(-1)[:, 1], logits[:, 1] - logits[:, 0]
        free = [t for t in range(len(x)) if not protected[t]]
        num = math.ceil(around.capacity * len(free))
    else:
        logits = (x @ router.weight.T + router.bias)[:, 0]
        weight, order, free = 1 + router.scale * torch.tanh(logits), logits, range(len(x))
        num = math.ceil(around.capacity * len(x))
    best = sorted(free, key=lambda t: -float(order[t].detach()))[:num]
    return logits, weight, sorted({*best, *(t for t in range(len(x)) if protected[t])})


def by_hand(module, batch, fields):
    """The objective, what each block chose, and the losses of routers."""
    model, weight_of_loss = module.model, fields.get("router_loss_weight", 0.01)
    arounds, chosen, losses = routed_blocks(model), {}, {}
    hidden = model.model.embed_tokens(batch["input_ids"])
    documents = (batch["position_ids"] == 0).cumsum(-1)
    for layer, block in enumerate(model.model.layers):
        out, router_logits, targets = [], [], []
        for row, x in enumerate(hidden):
            positions, own = batch["position_ids"][row], documents[row]
            if layer not in arounds:
                out.append(run_block(model, block, x, positions, own))
                continue
            is_protected = (
                batch["labels"][row] != -100 if "protect" in fields else torch.zeros(len(x), dtype=torch.bool)
            )
            logits, weight, places = decide(arounds[layer], x, is_protected)
            after = run_block(model, block, x[places], positions[places], own[places])
            new = list(x if logits.dim() == 2 else weight[:, None] * x)
            for token, y in zip(places, after, strict=True):
                new[token] = x[token] + weight[token] * (y - x[token])
            out.append(torch.stack(new))
            chosen.setdefault(layer, []).append(places)
            router_logits.append(logits)
            targets.append(torch.zeros(len(x), dtype=torch.long).index_fill(0, torch.tensor(places), 1))
        if router_logits and router_logits[0].dim() == 2 and weight_of_loss:
            losses[layer] = F.cross_entropy(torch.cat(router_logits), torch.cat(targets))
        hidden = torch.stack(out)
    logits = model.lm_head(model.model.norm(hidden))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
    return loss + weight_of_loss * sum(losses.values()), loss, chosen, losses


def gradients(module):
    return {name: p.grad for name, p in module.model.named_parameters()}


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_the_papers(method, mode):
    fields = METHODS[method]
    batch, plain = batch_of(), module_of(**fields)
    objective, loss, _, losses = by_hand(plain, batch, fields)
    objective.backward()
    module = module_of(mode=mode, **fields)
    total = module(batch)["total"]
    total.backward()
    torch.testing.assert_close(total, loss.float(), rtol=1e-6, atol=0)
    expected = gradients(plain)
    assert any("around" in name for name in expected)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for (value, _, count), wanted in zip(module.ledger.take(), losses.values(), strict=True):
        assert count == 1
        torch.testing.assert_close(value, wanted.float().detach())


def _watched(layers):
    """How many tokens of a row each block's MLP gets, and which of the row come out of the block as others."""
    sizes, moved = {}, {}
    for layer, block in enumerate(layers):
        block.mlp.register_forward_pre_hook(lambda _, args, n=layer: sizes.__setitem__(n, args[0].shape[1]))
        block.register_forward_hook(
            lambda _, args, out, n=layer: moved.__setitem__(n, (out - args[0]).abs().amax(-1).detach())
        )
    return sizes, moved


@pytest.mark.parametrize("method", METHODS)
def test_only_chosen_tokens_are_computed_and_bf16_chooses_as_fp64_does(method):
    fields, batch = METHODS[method], batch_of()
    _, _, chosen, _ = by_hand(module_of(**fields), batch, fields)
    first = min(chosen)
    for dtype in (torch.float32, torch.bfloat16):
        module = module_of(dtype=dtype, **fields)
        sizes, moved = _watched(module.model.model.layers)
        module(batch)["total"].backward()
        assert all(p.grad.dtype == dtype for p in module.model.parameters())
        for layer, places in chosen.items():
            most = max(map(len, places))
            assert sizes[layer] == (most if method != "protected" else min(13, -(-most // 2) * 2)), layer
        if METHODS[method].get("method") != "p_mod":
            assert [row.nonzero().flatten().tolist() for row in moved[first]] == chosen[first]


def test_capacity_falls_as_a_cosine_and_is_cut_at_both_ends():
    config = MixtureOfDepths(method="p_mod")
    cosine = [0.5 + 0.5 * math.cos(math.pi * layer / 31) for layer in range(32)]
    expected = {layer: max(0.15, share) for layer, share in enumerate(cosine) if share <= 0.85}
    assert config.capacities(32) == pytest.approx(expected)
    assert min(expected) == 8
    assert MixtureOfDepths().capacities(32) == dict.fromkeys(range(3, 31), 0.5)


@pytest.mark.parametrize("method", ["gamma", "own routers", "protected", "p"])
def test_who_decides_in_evaluation_and_what_that_means_for_causality(method):
    module, batch = module_of(**METHODS[method]).eval(), batch_of(2)
    positions = torch.arange(13).expand(2, -1)
    changed = batch["input_ids"].clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 61

    def logits(ids, **options):
        return module.model(input_ids=ids, position_ids=positions[: len(ids), : ids.shape[1]], use_cache=False).logits

    before, after = logits(batch["input_ids"]), logits(changed)
    assert not torch.allclose(before[:, 9:], after[:, 9:])
    by_itself = logits(batch["input_ids"][:, :9])
    if method == "p":  # top-k of the row: later tokens decide with
        assert not torch.allclose(before[:, :9], after[:, :9])
    else:
        torch.testing.assert_close(after[:, :9], before[:, :9], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(by_itself, before[:, :9], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logits(batch["input_ids"][:1]), before[:1], rtol=1e-10, atol=1e-10)
    assert module.ledger.take().count_nonzero() == 0


def test_in_evaluation_a_router_runs_the_block_for_what_it_finds_likelier_to_need_it():
    module, batch = module_of(**METHODS["own routers"]).eval(), batch_of()
    around = routed_blocks(module.model)[0]
    x = module.model.model.embed_tokens(batch["input_ids"])
    likely = around.router(x).weight >= 0.5
    assert 0 < likely.sum() < likely.numel()
    seen = []
    around.module.register_forward_hook(lambda _, args, out: seen.append((out != args[0]).any(-1)))
    module.model(**{k: batch[k] for k in ("input_ids", "position_ids")}, use_cache=False)
    assert torch.equal(seen[0], likely)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_without_a_mask_and_with_one_agree(attention):
    fields = METHODS["protected"]
    batch = batch_of()
    batch["position_ids"] = torch.arange(13).expand(3, -1).contiguous()
    plain = module_of(**fields)
    expected = by_hand(plain, batch, fields)[1].float()
    torch.testing.assert_close(module_of(attention=attention, **fields)(batch)["total"], expected, rtol=1e-6, atol=0)


def test_a_block_mask_is_cut_as_a_dense_one_is():
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 9 + [1] * 4])
    index = torch.tensor([[0, 3, 4, 7, 9, 12], [1, 2, 8, 9, 11, 0]])
    choice = Choice(index, torch.tensor([[True] * 6, [True] * 5 + [False]]))

    def sees(row, head, query, key):
        return (documents[row, query] == documents[row, key]) & (query >= key)

    cut = cut_mask(create_block_mask(sees, 2, None, 13, 13, device="cpu"), choice)
    dense = create_mask(sees, 2, 1, 13, 13, device="cpu")
    expected = cut_mask(dense, choice)
    assert torch.equal(create_mask(cut.mask_mod, 2, 1, 6, 6, device="cpu"), expected)
    assert not expected[1, 0, :5, 5].any()
    assert torch.equal(cut_mask(torch.where(dense, 0.0, -1e9), choice) >= -1.0, expected)


@pytest.mark.parametrize("method", ["gamma", "protected"])
def test_padding_is_chosen_last(method):
    module, batch = module_of(**METHODS[method]), batch_of()
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[1, 7:] = False
    batch["labels"][1, 6:] = -100
    module(batch | {"token_mask": mask})
    seen = []
    routed_blocks(module.model)[1].module.register_forward_hook(
        lambda _, args, out: seen.append((out != args[0]).any(-1))
    )
    module(batch | {"token_mask": mask})
    chosen = seen[0] & mask
    if method == "gamma":  # 7 of 13, and 7 are no padding
        assert torch.equal(chosen[1], mask[1])
    else:
        free = (mask & (batch["labels"] == -100)).sum(-1)
        num_protected = (batch["labels"] != -100).sum(-1)
        assert torch.equal(seen[0].sum(-1), num_protected + (0.4 * free).ceil().long())
        assert torch.equal(chosen, seen[0])


@pytest.mark.slow
def test_layers_share_one_compiled_graph():
    from torch._dynamo.utils import counters

    fields, batch = METHODS["gamma"], batch_of()
    expected, module = module_of(**fields), module_of(mode="full", **fields)
    torch._dynamo.reset()
    counters.clear()
    for block in module.model.model.layers:
        block.compile(backend="aot_eager")
    for each in (module, expected):
        each(batch)["total"].backward()
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, gradients(expected)[name], rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # with and without a choice
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek_v3"])
def test_other_families_train(family):
    module = module_of(family, dtype=torch.float32, **METHODS["gamma"])
    module(batch_of())["total"].backward()
    router = module.model.model.around["mixture_of_depths"].router
    assert router.weight.grad.abs().sum() > 0


def test_a_block_begins_as_it_was_but_for_what_it_leaves_out():
    model, offered = tiny(num_hidden_layers=LAYERS), context()
    install_techniques([MixtureOfDepths(method="p_mod", layers=[2], max_capacity=0.99)], model, offered)
    around = routed_blocks(model)[2]
    around.reset_parameters()
    x = torch.randn(2, 7, 32)
    assert torch.equal(around.router(x).weight, torch.ones(2, 7))
    other = DepthRouter(32, "softmax")
    other.reset_parameters()
    assert 0 < other.weight.abs().max() <= math.sqrt(6 / 34)


def test_export_is_refused():
    from leanmill.export.folding import fold

    with pytest.raises(ConfigError, match="keep the checkpoint"):
        fold(module_of(dtype=torch.float32, **METHODS["p"]).model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_capacity": 0.5}, "set method: p_mod"),
        ({"method": "p_mod", "protect": "labels"}, "set method: gamma_mod"),
        ({"method": "p_mod", "inference": "router"}, "set inference: top_k"),
        ({"router_loss_weight": 0, "protect": "labels"}, "set inference: router"),
        ({"method": "p_mod", "min_capacity": 0.9}, r"min_capacity: 0.85"),
        ({"layers": []}, r"e.g. layers: \[3, 4, 5\]|type e.g. layers"),
        ({"layers": [1, 1]}, "each once"),
        ({"capacity": 0}, "greater than 0"),
    ],
)
def test_contradictions_are_refused_with_what_to_type(fields, message):
    with pytest.raises(ValidationError, match=message):
        parse_technique({"type": "mixture_of_depths", **fields})


@pytest.mark.parametrize("method", METHODS)
def test_what_a_checkpoint_says_of_it_is_read_back(method):
    config = MixtureOfDepths(**METHODS[method])
    assert parse_technique(config.model_dump(mode="json")) == config


def test_models_it_does_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"choose in none of the 2 blocks.*layers: \[1\]"):
        install_techniques([MixtureOfDepths()], tiny(), context())
    with pytest.raises(ConfigError, match="layers \\[2\\] of the 2 blocks"):
        install_techniques([MixtureOfDepths(layers=[2])], tiny(), context())
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.*route and count; set protect: none"):
        install_techniques([MixtureOfDepths(layers=[1], protect="labels")], tiny("mixtral"), context())
    with pytest.raises(ConfigError, match="listed twice"):
        install_techniques([MixtureOfDepths(layers=[1]), MixtureOfDepths(layers=[1])], tiny(), context())
    module = module_of(dtype=torch.float32, **METHODS["p"]).eval()
    with pytest.raises(RunError, match="use_cache=False"):
        module.model(input_ids=tokens(), use_cache=True)
