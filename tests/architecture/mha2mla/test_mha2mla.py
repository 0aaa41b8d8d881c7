"""Frequencies by the authors' norms, factors by theirs, and the model that is written."""

import pytest
import torch

import leanmill.models.own_families  # noqa: F401
from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


OPTIONS = {"type": "mha2mla", "kv_lora_rank": 36, "rope_head_dim": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}


def logits(model, rows):
    with torch.no_grad():
        return model(**rows, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {"rope_parameters": YARN}), pytest.param("llama", {"attention_bias": True}, marks=pytest.mark.slow)],
)
def test_where_nothing_turns_a_whole_rank_changes_nothing(family, changes, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, num_hidden_layers=2, **changes)
    config = recipe(tmp_path / "in", text, tmp_path, OPTIONS)
    (report,) = compress(config, tmp_path / "out")
    assert "loses 0.00% of the energy" in str(report)
    assert "a cache keeps 48 numbers a token and layer in place of 48, 768 bytes a token in place of 768" in str(report)
    latent, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    still = rows | {"position_ids": torch.zeros_like(rows["position_ids"])}
    masked = still | {"attention_mask": torch.ones_like(rows["input_ids"])}  # one document, whatever positions say
    torch.testing.assert_close(logits(latent, masked), logits(model, masked), rtol=1e-4, atol=1e-4)
    assert (logits(latent, rows) - logits(model, rows)).abs().max() > 1e-2


def test_frequencies_and_factors_are_the_authors(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, "qwen2", num_hidden_layers=1)
    config = recipe(tmp_path / "in", text, tmp_path, OPTIONS | {"kv_lora_rank": 10})
    compress(config, tmp_path / "out")
    latent = load(tmp_path / "out")
    inputs, name = seen(model, rows_of(config, tokenizer)), "model.layers.0.self_attn"
    norms = []
    for projection, heads in (("q_proj", 6), ("k_proj", 3)):
        states = inputs[f"{name}.{projection}"][1].view(8, 16, heads, 2, 4)
        norms.append(states.norm(dim=3).mean((0, 1)))
    contribution = (norms[0] * norms[1].repeat_interleave(2, 0)).view(3, 2, 4).sum(1)
    kept = contribution.argsort(-1, descending=True)[:, :2].sort(-1).values
    assert latent.config.rotary_frequencies == [kept.tolist()]
    old, new = model.model.layers[0].self_attn, latent.model.layers[0].self_attn
    rotary = [[head * 8 + i for i in (*own, *(i + 4 for i in own))] for head, own in enumerate(kept.tolist())]
    rows = torch.tensor(rotary).flatten()
    torch.testing.assert_close(new.k_rope_proj.weight, old.k_proj.weight[rows])
    others = torch.tensor([row for row in range(24) if row not in rows.tolist()])
    joint = torch.cat([old.k_proj.weight[others], old.v_proj.weight]).detach()
    u, s, v = torch.linalg.svd(joint, full_matrices=False)
    product = torch.cat([new.k_up_proj.weight, new.v_up_proj.weight]) @ new.kv_down_proj.weight
    torch.testing.assert_close(product, u[:, :10] * s[:10] @ v[:10])
    torch.testing.assert_close(new.kv_down_proj.weight @ new.kv_down_proj.weight.t(), torch.eye(10).double())


@pytest.mark.parametrize(("frequencies", "kept"), [("high", [0, 1]), ("low", [2, 3]), ("uniform", [0, 2])])
def test_frequencies_by_number(frequencies, kept):
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    after = after_passes(config, [parse_pass(OPTIONS | {"frequencies": frequencies})], seed=0).config
    assert after["rotary_frequencies"] == [[kept] * 3] * 4


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {}, "none of them; give a model"),
        ("llama", {"rope_head_dim": 8, "kv_lora_rank": 20}, "even and below head_dim=8"),
        ("llama", {"rope_head_dim": 3}, "rotations take pairs"),
        ("llama", {"kv_lora_rank": 37}, "more than there is to hold here, 36"),
        ("llama", {"rope_head_dim": 6, "kv_lora_rank": 9, "frequencies": "uniform"}, "give one that does"),
    ],
)
def test_requests_that_do_not_fit(family, changes, message):
    config = ModelConfig(config={"model_type": family, **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass(OPTIONS | changes)], seed=0)
