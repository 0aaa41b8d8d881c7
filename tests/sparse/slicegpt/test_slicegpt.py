"""Rotations that change nothing, and the written model beside the whole one whose stream is projected."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import leanmill.models.own_families  # noqa: F401
from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, load, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def logits(model, rows):
    with torch.no_grad():
        return model(**rows, use_cache=False).logits


def normalised(x, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def projector(signals, eps, number):
    """The paper's C = sum X^T X with X what a norm without weights puts out, and Q Q^T of its first eigenvectors."""
    x = normalised(torch.cat([signal.flatten(0, -2) for signal in signals]).double(), eps)
    values, vectors = torch.linalg.eigh(x.t() @ x)
    q = vectors[:, values.argsort(descending=True)[:number]]
    return q @ q.t()


def halves(model, rows):
    """Each layer's attention and MLP as functions of what enters their norms."""
    inner, ids = model.model, rows["input_ids"]
    position = inner.rotary_emb(inner.embed_tokens(ids), position_ids=rows["position_ids"])
    for layer in inner.layers:

        def attend(x, layer=layer):
            normed = layer.input_layernorm(x)
            return layer.self_attn(hidden_states=normed, position_embeddings=position, attention_mask=None)[0]

        yield attend, lambda x, layer=layer: layer.mlp(layer.post_attention_layernorm(x))


@torch.no_grad()
def sliced_by_hand(model, rows, number, *, shared):
    """The model with its stream projected wherever a rotation is: with one projector, or each found after the last."""
    eps, embedded = model.config.rms_norm_eps, model.model.embed_tokens(rows["input_ids"])
    one = None
    if shared:
        x, seen = embedded, [embedded]
        for attend, mlp in halves(model, rows):
            x = x + attend(x)
            seen.append(x)
            x = x + mlp(x)
            seen.append(x)
        one = projector(seen, eps, number)

    def cut(x):
        return x @ (projector([x], eps, number) if one is None else one)

    x = cut(embedded)
    for attend, mlp in halves(model, rows):
        x = cut(x + attend(x))
        x = cut(x + mlp(x))
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize(
    ("family", "changes", "rotations"),
    [
        ("llama", {"tie_word_embeddings": True}, "shared"),
        ("qwen2", {}, "per_block"),
        pytest.param("llama", {"tie_word_embeddings": True}, "per_block", marks=pytest.mark.slow),
        pytest.param("qwen2", {}, "shared", marks=pytest.mark.slow),
    ],
)
def test_with_all_channels_nothing_changes(family, changes, rotations, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, **changes)
    options = {"type": "slicegpt", "hidden_size": 48, "rotations": rotations}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    rotated = load(tmp_path / "out")
    assert rotated.config.model_type == ("pruned_llama" if rotations == "per_block" else family)
    rows = rows_of(config, tokenizer)
    torch.testing.assert_close(logits(rotated, rows), logits(model, rows), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("family", "rotations"), [("llama", "shared"), ("qwen3", "per_block")])
def test_the_written_model_is_the_projected_one(family, rotations, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, tie_word_embeddings=family == "qwen3")
    options = {"type": "slicegpt", "hidden_size": 0.5, "multiple_of": 1, "rotations": rotations}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    (report,) = compress(config, tmp_path / "out")
    assert "48 channels cut to 24" in str(report)
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    assert small.model.embed_tokens.weight.shape == (300, 24)
    want = sliced_by_hand(model, rows, 24, shared=rotations == "shared")
    torch.testing.assert_close(logits(small, rows), want, rtol=1e-3, atol=1e-3)
    assert (logits(model, rows) - want).abs().max() > 0.1  # slicing tells
    foreseen = after_passes(config.model, config.passes, seed=0).config
    assert foreseen["hidden_size"] == 24
    assert foreseen.get("residual_rotations", False) == (rotations == "per_block")


def test_bf16_stays_bf16(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.bfloat16, num_hidden_layers=2)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "slicegpt", "hidden_size": 0.75})
    compress(config, tmp_path / "out")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small.config.hidden_size == 32
    assert torch.isfinite(logits(small, rows_of(config, tokenizer))).all()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"hidden_size": 64}, "at most 48"),
        ("llama", {"hidden_size": 44, "rotations": "shared"}, "not a multiple of the number of attention heads"),
        ("gemma2", {"hidden_size": 0.5}, "multiplies embeddings"),
        ("mistral", {"hidden_size": 0.5}, "windows of 8 tokens"),
        ("mixtral", {"hidden_size": 0.5}, "none of them; give a model"),
    ],
)
def test_requests_that_do_not_fit(family, options, message):
    changes = {"sliding_window": 8} if family == "mistral" else {}
    config = ModelConfig(config={"model_type": family, **SIZES, **changes}, attention="eager")
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "slicegpt", **options})], seed=0)
