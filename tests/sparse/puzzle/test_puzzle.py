"""Alternatives as they begin and learn, scores against the model itself, the choice, and the model that is written."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import leanmill.models.own_families  # noqa: F401
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.sparse.puzzle.alternatives import Half, Pair
from leanmill.sparse.puzzle.budgets import Budget, choose
from leanmill.sparse.puzzle.config import Puzzle
from leanmill.sparse.puzzle.distillation import normalised_mse
from leanmill.sparse.puzzle.surgeon import PuzzleSurgeon
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


SMALL = {
    "type": "puzzle",
    "parameters": 0.8,
    "key_value_heads": [1, "linear", "none"],
    "neurons": [24, "linear", "none"],
}


@pytest.fixture
def surgeons(monkeypatch):
    """Those that operate, in turn."""
    made = []
    begin = PuzzleSurgeon.__init__
    monkeypatch.setattr(PuzzleSurgeon, "__init__", lambda self, asked: (begin(self, asked), made.append(self))[0])
    return made


def operated(tmp_path, text, tokenizer, surgeons, options, family="llama", **changes):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, dtype=torch.float32, num_hidden_layers=2, **changes)
    config = recipe(tmp_path / "in", text, tmp_path, options)
    (report,) = compress(config, tmp_path / "out")
    return model, surgeons[-1], rows_of(config, tokenizer), str(report)


def test_the_error_is_that_of_the_paper_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    found = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    error = normalised_mse(found, wanted)
    error.backward()
    assert float(error.detach()) == pytest.approx(
        float(F.mse_loss(found.detach(), wanted) / F.mse_loss(wanted, torch.zeros(()).expand_as(wanted)))
    )
    torch.testing.assert_close(found.grad, 2 * (found.detach() - wanted) / wanted.square().sum())
    assert float(normalised_mse(torch.zeros_like(wanted), wanted)) == pytest.approx(1)


@pytest.mark.parametrize(("family", "changes"), [("qwen2", {}), pytest.param("qwen3", {}, marks=pytest.mark.slow)])
def test_alternatives_begin_as_the_paper_says_and_are_scored_in_the_model(
    family,
    changes,
    text,  # noqa: F811
    tokenizer,  # noqa: F811
    tmp_path,
    surgeons,
):
    model, surgeon, rows, _ = operated(tmp_path, text, tokenizer, surgeons, SMALL | {"epochs": 0}, family, **changes)
    found = {(part, half.name): one.tensors for (part, half), one in surgeon.library[0].items()}
    layer, inputs = model.model.layers[0], seen(model, rows)
    attention, mlp = layer.self_attn, layer.mlp
    pooled = attention.k_proj.weight.view(3, 8, 48).mean(0)
    torch.testing.assert_close(found["attention", "1"]["self_attn.k_proj.weight"], pooled)
    values = attention.v_proj.weight.view(3, 8, 48).repeat_interleave(2, 0).reshape(48, 48)
    torch.testing.assert_close(
        found["attention", "linear"]["attention_linear.weight"], attention.o_proj.weight @ values
    )
    torch.testing.assert_close(found["mlp", "linear"]["mlp_linear.weight"], mlp.down_proj.weight @ mlp.up_proj.weight)
    if family == "qwen2":
        bias = attention.v_proj.bias.view(3, 8).repeat_interleave(2, 0).flatten()
        torch.testing.assert_close(
            found["attention", "linear"]["attention_linear.bias"], attention.o_proj.weight @ bias
        )
    contribution = inputs["model.layers.0.mlp.down_proj"][0].abs().mean((0, 1)) * mlp.down_proj.weight.norm(dim=0)
    kept = contribution.argsort(descending=True)[:24].sort().values
    torch.testing.assert_close(found["mlp", "24"]["mlp.down_proj.weight"], mlp.down_proj.weight[:, kept])
    # Errors and scores of what leaves nothing to build: a layer without its attention.
    error = surgeon.library[0]["attention", Half(0)].error
    hidden, out = inputs["model.layers.0"]
    alone = hidden + mlp(layer.post_attention_layernorm(hidden))
    halves = [normalised_mse(a, o) for a, o in zip(alone.split(4), out.split(4), strict=True)]
    assert error == pytest.approx(float(sum(halves).detach() / 2), rel=1e-4)
    with torch.no_grad():
        before = model(**rows, use_cache=False).logits.log_softmax(-1)
        attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
        after = model(**rows, use_cache=False).logits.log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    number = surgeon.pairs.index(Pair(Half(0), Half(56)))
    assert surgeon.scores[0, number] == pytest.approx(float(kl), rel=1e-3)
    assert surgeon.scores[0, surgeon.pairs.index(surgeon.family.whole)] == 0


def test_what_is_written_computes_what_was_chosen_and_fits_the_budgets(text, tokenizer, tmp_path, surgeons):  # noqa: F811
    options = SMALL | {"epochs": 2, "lr": 1e-3, "memory_bytes": 190_000, "sequence_length": 64}
    model, surgeon, rows, report = operated(tmp_path, text, tokenizer, surgeons, options)
    small = load(tmp_path / "out").float()
    numel = sum(p.numel() for p in small.parameters())
    whole = sum(p.numel() for p in model.parameters())
    cache = 2 * sum(small.config.num_key_value_heads_by_layer) * 8 * 4 * 64
    assert f"{numel:,} of {whole:,} parameters" in report
    assert f"a cache of {cache:,} bytes" in report
    assert numel <= 0.8 * whole
    assert 4 * numel + cache <= 190_000
    # The chosen pairs, put into the old model one by one, are the new one.
    layers = [surgeon._built([(i, pair)], 0, model.model.layers[i]) for i, pair in enumerate(surgeon.chosen)]
    model.model.layers = torch.nn.ModuleList(layers)
    with torch.no_grad():
        ours, theirs = (one(**rows, use_cache=False).logits for one in (small, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_alternatives_learn(text, tokenizer, tmp_path, surgeons):  # noqa: F811
    errors = []
    for number, epochs in enumerate((0, 8)):
        (tmp_path / str(number)).mkdir()
        options = SMALL | {"epochs": epochs, "lr": 3e-3, "pairs": "added"}
        _, surgeon, *_ = operated(tmp_path / str(number), text, tokenizer, surgeons, options)
        errors.append({key: one.error for key, one in surgeon.library[0].items()})
        alone = surgeon.family.with_half
        rows = [
            surgeon.pairs.index(one)
            for one in (Pair(Half(1), Half(24)), alone("attention", Half(1)), alone("mlp", Half(24)))
        ]
        assert surgeon.scores[1, rows[0]] == pytest.approx(surgeon.scores[1, rows[1]] + surgeon.scores[1, rows[2]])
    for key, before in errors[0].items():
        assert errors[1][key] == before if key[1] == Half(0) else errors[1][key] < 0.9 * before


def test_the_choice_is_the_best_of_all():
    pairs = [Pair(Half(a), Half(m)) for a in (2, 0) for m in (8, 4, 0)]
    scores = np.random.default_rng(0).random((3, 6))
    scores[:, 0], scores[1, 4] = 0, np.inf
    budgets = [Budget(name="a", taken=[6, 5, 3, 4, 2, 0], most=9), Budget(name="b", taken=[1, 3, 2, 1, 0, 0], most=5)]
    allowed = [
        rows
        for rows in itertools.product(range(6), repeat=3)
        if all(sum(one.taken[row] for row in rows) <= one.most for one in budgets)
        and any(pairs[row].attention.size for row in rows)
    ]
    best = min(allowed, key=lambda rows: sum(scores[layer, row] for layer, row in enumerate(rows)))
    assert choose(scores, pairs, budgets) == [pairs[row] for row in best]
    with pytest.raises(RunError, match="no choice keeps to the budgets; the smallest alternatives take a 0"):
        choose(scores, pairs, [Budget(name="a", taken=[6, 5, 3, 4, 2, 0], most=1)])


def test_latencies_are_measured_once_and_read_again(text, tokenizer, tmp_path, surgeons):  # noqa: F811
    path = tmp_path / "table.json"
    options = SMALL | {"epochs": 0, "pairs": "added", "speedup": 1.5, "latency_table": str(path)}
    del options["parameters"]
    operated(tmp_path, text, tokenizer, surgeons, options)
    table = json.loads(path.read_text())
    assert table["attention"].keys() == {"3", "1", "linear"}
    assert table["mlp"].keys() == {"56", "24", "linear"}
    path.write_text(json.dumps({"attention": {"3": 9, "1": 4, "linear": 1}, "mlp": {"56": 6, "24": 3, "linear": 1}}))
    compress(recipe(tmp_path / "in", text, tmp_path, options), tmp_path / "again")
    us = {"3": 9, "1": 4, "linear": 1, "56": 6, "24": 3, "none": 0}
    assert 0 < sum(us[p.attention.name] + us[p.mlp.name] for p in surgeons[-1].chosen) <= 2 * 15 / 1.5
    with pytest.raises(ConfigError, match="has no latency of '8'"):
        compress(recipe(tmp_path / "in", text, tmp_path, options | {"neurons": [8]}), tmp_path / "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing bounds the model"),
        ({"parameters": 0.5, "latency_table": "x"}, "latency_table is for speedup"),
        ({"parameters": 0.5, "key_value_heads": [2]}, "type some of 1, 3"),
        ({"parameters": 0.5, "neurons": [57]}, "type at most 56"),
    ],
)
def test_requests_that_do_not_fit(options, message):
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "puzzle", **options})], seed=0)


def test_what_it_leaves_is_refused_by_passes_that_cut_heads():
    config = {"model_type": "pruned_llama", **SIZES, "num_hidden_layers": 2, "linear_mlp_by_layer": [False, True]}
    config |= {"intermediate_size_by_layer": [56, 0]}
    with pytest.raises(ConfigError, match="matrices in the place of attention or MLP"):
        after_passes(ModelConfig(config=config), [parse_pass({"type": "flap", "sparsity": 0.5})], seed=0)
    pairs = parse_pass({"type": "welore", "rank_reduction": 0.5})
    after = after_passes(ModelConfig(config=config), [pairs], seed=0).config
    assert after["linear_mlp_by_layer"] == [False, True]  # the matrix stays
    assert Puzzle(parameters=0.5).reads_text
