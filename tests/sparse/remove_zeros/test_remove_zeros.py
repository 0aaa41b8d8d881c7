"""What is zero is cut out, and nothing else changes."""

import pytest
import torch

from leanmill.core.registry import parse_pass
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import load, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def test_zeros_go_and_the_model_computes_the_same(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, "qwen2")
    first, second, third, fourth = model.model.layers
    with torch.no_grad():
        first.mlp.down_proj.weight[:, :50] = 0
        first.self_attn.o_proj.weight[:, 16:32] = 0  # both query heads of the second key-value head
        second.mlp.up_proj.weight[7] = 0
        second.self_attn.o_proj.weight[:, :8] = 0  # one query head of two, which stays
        third.self_attn.v_proj.weight.zero_()
        third.self_attn.v_proj.bias[:8] = 0  # the other heads have their biases
        for half in (fourth.mlp.down_proj, fourth.self_attn.o_proj):
            half.weight.zero_()
    model.save_pretrained(tmp_path / "in")
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "remove_zeros"})
    compress(config, tmp_path / "out")
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    assert small.config.num_hidden_layers == 3
    assert small.config.num_key_value_heads_by_layer == [2, 3, 2]
    assert small.config.num_attention_heads_by_layer == [4, 6, 4]
    assert small.config.intermediate_size_by_layer == [6, 55, 56]
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_bias_of_a_half_that_is_zero_stays(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, num_hidden_layers=3, attention_bias=True, mlp_bias=True)
    first, second, third = model.model.layers
    with torch.no_grad():
        first.mlp.down_proj.weight.zero_()
        second.self_attn.o_proj.weight.zero_()
        third.mlp.down_proj.weight.zero_()
        third.mlp.down_proj.bias.zero_()
    model.save_pretrained(tmp_path / "in")
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "remove_zeros"})
    compress(config, tmp_path / "out")
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    assert small.config.intermediate_size_by_layer == [1, 56, 0]
    assert small.config.num_key_value_heads_by_layer == [3, 1, 3]
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_halves_that_were_dropped_as_zeros_go_for_good(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, "qwen3", dtype=torch.bfloat16, num_hidden_layers=2)
    dropping = {"type": "drop_blocks", "dropped": 2, "parts": "halves", "order": "greedy", "written_as_zeros": True}
    zeros = recipe(tmp_path / "in", text, tmp_path, dropping | {"first_layer": 1, "dropped": 1})
    compress(zeros, tmp_path / "zeros")
    compress(
        zeros.model_copy(update={"passes": [*zeros.passes, parse_pass({"type": "remove_zeros"})]}), tmp_path / "out"
    )
    whole, small, rows = load(tmp_path / "zeros"), load(tmp_path / "out"), rows_of(zeros, tokenizer)
    gone = small.config.num_attention_heads_by_layer[1], small.config.intermediate_size_by_layer[1]
    assert 0 in gone
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    with torch.no_grad():
        want, got = whole(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
