"""Linear attention that learns what softmax attention puts out, and the model that is written."""

import pytest
import torch

import leanmill.models.own_families  # noqa: F401
from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, load, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def mixed(model, rows):
    """What enters each layer's output projection, of all rows."""
    found = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(**rows, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found, logits


@pytest.mark.parametrize(
    ("family", "changes"), [("qwen3", {"tie_word_embeddings": True}), pytest.param("qwen2", {}, marks=pytest.mark.slow)]
)
def test_windows_as_long_as_the_text_change_nothing(family, changes, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, num_hidden_layers=2, **changes)
    options = {"type": "lolcats", "sliding_window": 16, "feature_dim": 4, "epochs": 1}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    linear, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    assert linear.config.model_type == "linear_llama"
    torch.testing.assert_close(mixed(linear, rows)[1], mixed(model, rows)[1], rtol=1e-4, atol=1e-4)


def test_maps_learn_what_attention_put_out(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=1)
    errors = []
    for number, (epochs, lr) in enumerate([(1, 1e-9), (40, 1e-2)]):
        options = {"type": "lolcats", "sliding_window": 3, "feature_dim": 8, "epochs": epochs, "lr": lr}
        config = recipe(tmp_path / "in", text, tmp_path, options)
        (report,) = compress(config, tmp_path / f"out-{number}")
        linear, rows = load(tmp_path / f"out-{number}"), rows_of(config, tokenizer)
        (ours,), (theirs,) = mixed(linear, rows)[0], mixed(model, rows)[0]
        errors.append(float((ours - theirs).square().mean() / theirs.square().mean()))
        if number == 0:  # maps that do not move, so the report is of the very weights that were written
            assert f"misses {errors[0]:.2%} of" in str(report)
    assert errors[1] < 0.6 * errors[0], errors
    before, after = model.state_dict(), linear.state_dict()
    assert all(torch.equal(after[name].float(), tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, "none of them; give a model"),
        ("mistral", {"sliding_window": 8}, "windows of 8 tokens"),
        ("llama", {"attention_dropout": 0.1}, "no maps to drop out of"),
    ],
)
def test_requests_that_do_not_fit(family, changes, message):
    config = ModelConfig(config={"model_type": family, **SIZES, **changes}, attention="eager")
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "lolcats"})], seed=0)
