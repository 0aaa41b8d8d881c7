"""What is zero is cut out, and nothing else changes."""

import torch

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
