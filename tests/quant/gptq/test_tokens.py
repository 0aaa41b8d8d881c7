"""GPTQ on inputs that count by the attention their tokens get (RSQ)."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.core.gram import Gram
from leanmill.core.passes import InputStatistics
from leanmill.core.registry import parse_pass
from leanmill.quant.gptq.tokens import by_attention
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import rows_of, save
from tests.trainer.passes.test_run import inputs_of, recipe, text, tokenizer  # noqa: F401  (fixtures)


def test_weights_grow_with_the_attention_a_token_gets():
    maps = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).tril()
    maps[1] = 0.25
    got = by_attention(maps, 0.1)
    received = [sum(float(maps[0, head, i, j]) for head in range(3) for i in range(5)) for j in range(5)]
    low, high = min(received), max(received)
    want = torch.tensor([0.1 + 0.9 * (one - low) / (high - low) for one in received])
    torch.testing.assert_close(got[0], want)
    assert torch.equal(got[1], torch.ones(5))


def test_the_written_weights_are_those_of_weighted_inputs(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    options = {"type": "gptq", "weight_bits": 3, "group_size": 8, "tokens": "attention", "least_token_weight": 0.05}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(**rows, use_cache=False, output_attentions=True).attentions[0]
    counts, seen = by_attention(maps, 0.05).flatten(), inputs_of(model, rows)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        x = seen[name] * counts[:, None]
        statistics = InputStatistics(num_tokens=len(x), square_sum=x.square().sum(0), gram=Gram.of(x.T @ x))
        solve = parse_pass(options).solver().prepare(statistics)
        want = solve(model.get_submodule(name).weight.detach().clone()).weight
        close = torch.isclose(after.get_submodule(name).weight, want, rtol=1e-3, atol=1e-3).float().mean()
        assert close > 0.97, name  # a weight in the middle between two levels may take either
        plain = InputStatistics(
            num_tokens=len(x), square_sum=x.square().sum(0), gram=Gram.of(seen[name].T @ seen[name])
        )
        other = parse_pass(options).solver().prepare(plain)(model.get_submodule(name).weight.detach().clone()).weight
        assert torch.isclose(other, want, rtol=1e-3, atol=1e-3).float().mean() < 0.95


def test_the_least_weight_of_tokens_that_count_alike_is_refused():
    with pytest.raises(ValueError, match="type tokens: attention"):
        parse_pass({"type": "gptq", "least_token_weight": 0.05})
