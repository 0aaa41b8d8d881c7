"""GPTQ on inputs that count by the attention their tokens get (RSQ)."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.core.gram import Gram
from leanmill.core.passes import InputStatistics, SeenTokens
from leanmill.core.registry import parse_pass
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import rows_of, save
from tests.trainer.passes.test_run import inputs_of, recipe, text, tokenizer  # noqa: F401  (fixtures)


IDS = torch.tensor([[3, 1, 1, 2, 3, 1], [4, 4, 0, 1, 3, 2]])
FREQUENCIES = torch.bincount(IDS.flatten(), minlength=7)


def seen(**more):
    return SeenTokens(ids=IDS, frequencies=FREQUENCIES, **more)


def weights(kind, tokens, **options):
    return parse_pass({"type": "gptq", "tokens": kind, **options}).token_weights(tokens)


def between(values, least):
    low, high = min(values), max(values)
    return torch.tensor([least + (1 - least) * (one - low) / (high - low) for one in values])


def test_weights_grow_with_the_attention_a_token_gets():
    maps = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).tril()
    maps[1] = 0.25
    got = weights("attention", seen(maps=maps), least_token_weight=0.1)
    received = [sum(float(maps[0, head, i, j]) for head in range(3) for i in range(6)) for j in range(6)]
    torch.testing.assert_close(got[0], between(received, 0.1))
    assert torch.equal(got[1], torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_by_what_tokens_and_states_are(dtype):
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = (torch.randn(2, 6, 5, generator=generator).to(dtype) for _ in range(2))
    tokens = seen(inputs=inputs, outputs=outputs)
    x, y = inputs.double(), outputs.double()
    for row in range(2):
        by_hand = {
            "rare": [-int(IDS.eq(token).sum()) for token in IDS[row]],
            "norm": [float(one.square().sum().sqrt()) for one in x[row]],
            "unchanged": [-float((b - a).square().sum().sqrt()) for a, b in zip(x[row], y[row], strict=True)],
            "distant": [sum(float((a - b).square().sum()) for b in x[row]) / 6 for a in x[row]],
        }
        for kind, values in by_hand.items():
            torch.testing.assert_close(weights(kind, tokens)[row], between(values, 0.01), msg=kind)


def test_only_the_ends_of_rows_count():
    assert weights("first", seen(), token_share=0.34)[1].tolist() == [1, 1, 0, 0, 0, 0]
    assert weights("first_and_last", seen(), token_share=0.5)[0].tolist() == [1, 1, 0, 0, 0, 1]
    assert weights("first_and_last", seen(), token_share=0.01)[0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.slow
def test_blocks_of_several_layers_have_weights_too(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    passes = [
        {"type": "share_blocks", "group_size": 2},
        {"type": "gptq", "group_size": 8, "tokens": "distant"},
        {"type": "gptq", "group_size": 8, "tokens": "attention"},
    ]
    compress(recipe(tmp_path / "in", text, tmp_path, *passes), tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(parameter).all() for parameter in after.parameters())


def test_the_written_weights_are_those_of_weighted_inputs(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    options = {"type": "gptq", "weight_bits": 3, "group_size": 8, "tokens": "attention", "least_token_weight": 0.05}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(**rows, use_cache=False, output_attentions=True).attentions[0]
    counts = weights(
        "attention", SeenTokens(ids=rows["input_ids"], frequencies=FREQUENCIES, maps=maps), least_token_weight=0.05
    )
    counts, inputs = counts.flatten(), inputs_of(model, rows)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        x = inputs[name] * counts[:, None]
        statistics = InputStatistics(num_tokens=len(x), square_sum=x.square().sum(0), gram=Gram.of(x.T @ x))
        solve = parse_pass(options).solver().prepare(statistics)
        want = solve(model.get_submodule(name).weight.detach().clone()).weight
        close = torch.isclose(after.get_submodule(name).weight, want, rtol=1e-3, atol=1e-3).float().mean()
        assert close > 0.97, name  # a weight in the middle between two levels may take either
        plain = InputStatistics(
            num_tokens=len(x), square_sum=x.square().sum(0), gram=Gram.of(inputs[name].T @ inputs[name])
        )
        other = parse_pass(options).solver().prepare(plain)(model.get_submodule(name).weight.detach().clone()).weight
        assert torch.isclose(other, want, rtol=1e-3, atol=1e-3).float().mean() < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_token_weight": 0.05}, "type tokens: attention"),
        ({"tokens": "norm", "token_share": 0.5}, "type tokens: first"),
        ({"tokens": "first", "least_token_weight": 0.5}, "says nothing with tokens: first"),
    ],
)
def test_what_says_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_pass({"type": "gptq", **options})
