"""Latent attention that computes what there was where it can, and the paper's equations where it cannot."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, load, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def logits(model, rows):
    with torch.no_grad():
        return model(**rows, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, {"kv_lora_rank": 9}),
        ("qwen2", {"num_key_value_heads": 1}, {"kv_lora_rank": 9, "q_lora_rank": 49, "balance": False}),
        pytest.param(
            "llama",
            {"num_key_value_heads": 1, "attention_bias": True},
            {"kv_lora_rank": 9, "q_lora_rank": 49},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_key_value_head_and_whole_ranks_change_nothing(family, changes, options, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, **changes)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "transmla", **options})
    (report,) = compress(config, tmp_path / "out")
    assert "a cache keeps 17 numbers a token and layer in place of 16" in str(report)
    latent, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    assert type(latent).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    torch.testing.assert_close(logits(latent, rows), logits(model, rows), rtol=1e-4, atol=1e-4)


def complex_rows(layer, heads):
    """A projection as complex rows [heads, 4, n + 1] of inputs and a one."""
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight), dtype=torch.float64)
    rows = torch.cat([layer.weight, bias[:, None]], dim=1).detach().view(heads, 8, -1)
    return torch.complex(rows[:, :4], rows[:, 4:])


def attention_by_hand(attention, x, positions, *, fold, per_group, rank, balance):
    """Softmax attention whose scores are the paper's, of x [B, S, H] which also calibrates; heads of 8, 6 on 3."""
    ones = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    z = torch.einsum("gjn,bsn->bsgj", complex_rows(attention.k_proj, 3), ones.to(torch.complex128))
    w = torch.einsum("hjn,bsn->bshj", complex_rows(attention.q_proj, 6), ones.to(torch.complex128))
    theta = 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    rest, scores = z.clone(), torch.zeros(len(x), 6, x.shape[1], x.shape[1], dtype=torch.float64)
    step = fold // per_group
    for first in range(0, 4, fold):
        group = z[..., first : first + fold].flatten(2)  # [B, S, 3 x fold]
        seen = group.flatten(0, 1)
        values, vectors = torch.linalg.eigh(seen.t() @ seen.conj())
        for number, p in enumerate(values.argsort(descending=True)[:per_group]):
            u = vectors[:, p]
            part = (torch.einsum("bsc,c->bs", group, u.conj())[..., None] * u).view(*x.shape[:2], 3, fold)
            rest[..., first : first + fold] -= part
            turned = torch.exp(1j * positions * theta[first + number * step])[..., None, None]
            keys = (turned * part).repeat_interleave(2, dim=2)
            queries = turned * w[..., first : first + fold]
            scores += torch.einsum("bqhj,bkhj->bhqk", queries.conj(), keys).real
    k_rest = torch.cat([rest.real, rest.imag], dim=-1).flatten(2)
    v = attention.v_proj(x)
    centred = [(m - m.flatten(0, 1).mean(0)).flatten(0, 1) for m in (k_rest, v)]
    scale = (centred[0].square().sum() / centred[1].square().sum()).sqrt() if balance else 1.0
    joint, middle = torch.cat([k_rest / scale, v], dim=-1), torch.cat([centred[0] / scale, centred[1]], dim=1)
    basis = torch.linalg.eigh(middle.t() @ middle).eigenvectors.flip(1)[:, : rank - 1]
    mean = joint.flatten(0, 1).mean(0)
    k_rest, v = (mean + (joint - mean) @ basis @ basis.t()).split(24, dim=-1)
    k_rest, v = (m.unflatten(-1, (3, 8)).repeat_interleave(2, dim=2) for m in (k_rest, v))
    q = torch.cat([w.real, w.imag], dim=-1)
    scores += torch.einsum("bqhd,bkhd->bhqk", q, k_rest * scale)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    weights = (scores / math.sqrt(8)).masked_fill(~causal, -math.inf).softmax(-1)
    return attention.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"kv_lora_rank": 21}, {"fold": 1, "per_group": 1, "rank": 21, "balance": True}),
        (
            {"kv_lora_rank": 14, "qk_rope_head_dim": 4, "frequency_fold": 4, "balance": False},
            {"fold": 4, "per_group": 2, "rank": 14, "balance": False},
        ),
    ],
)
def test_the_written_model_is_the_papers(options, by_hand, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, num_hidden_layers=1, attention_bias=False)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "transmla", **options})
    compress(config, tmp_path / "out")
    latent, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    with torch.no_grad():
        inner, layer = model.model, model.model.layers[0]
        x = inner.embed_tokens(rows["input_ids"])
        positions = rows["position_ids"].double()
        x = x + attention_by_hand(layer.self_attn, layer.input_layernorm(x), positions, **by_hand)
        want = model.lm_head(inner.norm(x + layer.mlp(layer.post_attention_layernorm(x))))
    torch.testing.assert_close(logits(latent, rows), want, rtol=1e-3, atol=1e-3)
    assert (logits(model, rows) - want).abs().max() > 0.1  # it tells


def test_a_cache_keeps_the_latent_alone_and_tells_the_same(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.bfloat16, num_hidden_layers=2)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "transmla", "kv_lora_rank": 12})
    compress(config, tmp_path / "out")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    latent, ids = stored.float().eval(), rows_of(config, tokenizer)["input_ids"][:2]
    with torch.no_grad():
        begun = latent(ids[:, :9], use_cache=True)
        ended = latent(ids[:, 9:], past_key_values=begun.past_key_values, use_cache=True)
    found = torch.cat([begun.logits, ended.logits], dim=1)
    torch.testing.assert_close(found, logits(latent, {"input_ids": ids}), rtol=1e-4, atol=1e-4)
    (layer, _) = ended.past_key_values.layers
    assert (layer.keys.numel() + layer.values.numel()) == ids.numel() * (12 + 8)


@pytest.mark.parametrize(
    ("family", "changes", "options", "message"),
    [
        ("qwen3", {}, {}, "none of them; give a model"),
        ("qwen2", {}, {}, "give q_lora_rank, e.g. 49"),
        ("mistral", {"sliding_window": 8}, {}, "windows of 8 tokens"),
        ("llama", {"mlp_bias": True}, {}, "without mlp_bias"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "whose rope_type is",
        ),
        ("llama", {}, {"kv_lora_rank": 42}, "than there is to hold here, 41"),
        ("llama", {}, {"qk_rope_head_dim": 6}, "does not divide the size of a head, 8"),
        ("llama", {}, {"frequency_fold": 3}, "to divide the 4 frequencies"),
        ("llama", {}, {"qk_rope_head_dim": 4, "frequency_fold": 1}, "a multiple of 2"),
        ("llama", {}, {"qk_rope_head_dim": 1}, "greater than or equal to 2"),
        ("llama", {}, {"qk_rope_head_dim": 3}, "is odd"),
    ],
)
def test_requests_that_do_not_fit(family, changes, options, message):
    config = ModelConfig(config={"model_type": family, **SIZES, **changes})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "transmla", "kv_lora_rank": 16, **options})], seed=0)
