"""What goes by the paper's measure, and the written model beside the whole one with means in place of what goes."""

import pytest
import torch

from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, best, heads_by_hand, load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


@pytest.mark.parametrize("biased", [False, True])
def test_the_written_model_has_means_in_place_of_what_goes(biased, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, num_hidden_layers=2, attention_bias=biased, mlp_bias=biased)
    options = {"type": "flap", "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = recipe(tmp_path / "in", text, tmp_path, options, attention="eager")
    (report,) = compress(config, tmp_path / "out")
    assert "56 neurons cut to 24, biases in their place" in str(report)
    rows = rows_of(config, tokenizer)
    inputs = {
        name: found[0].flatten(0, -2)
        for name, found in seen(model, rows).items()
        if name.endswith(("o_proj", "down_proj"))
    }
    for name, x in inputs.items():
        module = model.get_submodule(name)
        scores = x.var(0, unbiased=False) * module.weight.detach().square().sum(0)
        if name.endswith("o_proj"):
            heads = torch.tensor(heads_by_hand(scores.view(6, 8).sum(1).sqrt(), 2, 2))
            kept = (heads[:, None] * 8 + torch.arange(8)).flatten()
        else:
            kept = torch.tensor(best(scores, 24))
        stays = torch.zeros(x.shape[1], dtype=torch.bool)
        stays[kept] = True
        mean = x.mean(0)
        module.register_forward_pre_hook(lambda _, x, stays=stays, mean=mean: (torch.where(stays, x[0], mean),))
    small = load(tmp_path / "out")
    assert small.config.attention_bias
    assert small.config.mlp_bias
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_layers_share_out_what_goes_by_standardised_fluctuation(biased, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, "qwen2" if biased else "llama", num_hidden_layers=2)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "flap", "sparsity": 0.4})
    (report,) = compress(config, tmp_path / "out")
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    assert "112 neurons cut to" in str(report)
    structures, parts = [], {}
    for name, (given, _) in seen(model, rows).items():
        if name.endswith(("o_proj", "down_proj")):
            x = given.flatten(0, -2).double()
            scores = x.var(0, unbiased=False) * model.get_submodule(name).weight.detach().double().square().sum(0)
            z = (scores - scores.mean()) / scores.std()
            width = 16 if name.endswith("o_proj") else 1  # two query heads of 8 features share a key-value head
            parts[name] = (x.mean(0), width, torch.zeros(len(z)))
            # Query and output rows of two heads, key and value rows of one; or gate, up and down.
            cost = 48 * (2 * 16 + 2 * 8) if width == 16 else 48 * 3
            structures += [(float(value), cost, name, i) for i, value in enumerate(z.view(-1, width).mean(1))]
    structures.sort(key=lambda one: -one[0])
    total, kept, best_gap = sum(cost for _, cost, *_ in structures), 0, None
    for number, (_, cost, *_) in enumerate(structures, 1):
        kept += cost
        gap = abs(kept - 0.6 * total)
        if best_gap is None or gap < best_gap[0]:
            best_gap = (gap, number)
    for _, _, name, i in structures[: best_gap[1]]:
        _, width, stays = parts[name]
        stays[i * width : (i + 1) * width] = 1
    for name, (mean, _, stays) in parts.items():
        assert stays.any(), "the test is of layers of which something stays"
        stays = stays.bool()
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, stays=stays, mean=mean: (torch.where(stays, x[0], mean),)
        )
    assert small.config.intermediate_size_by_layer == [
        int(parts[f"model.layers.{i}.mlp.down_proj"][2].sum()) for i in (0, 1)
    ]
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {}, "nothing is asked for"),
        ("llama", {"intermediate_size": 56}, "has these sizes already"),
        ("qwen3", {"intermediate_size": 0.5}, "has no mlp_bias"),
        ("llama", {"intermediate_size": 0.5, "sparsity": 0.5}, "stands instead of sizes"),
        ("mixtral", {"intermediate_size": 0.5}, "none of them; give a model"),
    ],
)
def test_requests_that_do_not_fit(family, options, message):
    config = ModelConfig(config={"model_type": family, **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "flap", **options})], seed=0)
