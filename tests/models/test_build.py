"""Every family builds on meta, fills, runs, keeps documents apart; bad input is one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.counting import num_active_parameters, num_parameters
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen
from tests.models.families import FAMILIES, tiny_config


def materialised(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> nn.Module:
    config = ModelConfig(config=tiny_config(family, **changes), attention=attention)
    model = build_on_meta(config)
    make_materialiser(config, seed=seed)(model)
    return model


def packed_rows(lengths: tuple[int, ...] = (7, 10), rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (rows, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    return ids, positions


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_then_values_then_a_finite_step(family: str) -> None:
    config = ModelConfig(config=tiny_config(family))
    model = build_on_meta(config, vocab_size=97, sequence_length=64)
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert model.config.use_cache is False
    make_materialiser(config, seed=0)(model)
    ids, positions = packed_rows()
    logits = model(input_ids=ids, position_ids=positions).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    assert logits.isfinite().all()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # a bias for choosing experts, which no gradient reaches
            assert name.endswith("e_score_correction_bias")
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
    + [(family, "per_document") for family in FAMILIES if family != "olmoe"]
    # Compiled for tens of seconds, and not what a CPU is given.
    + [pytest.param(f, "flex_attention", marks=pytest.mark.slow) for f in FAMILIES if f != "olmoe"],
)
def test_no_token_attends_across_documents(family: str, attention: str) -> None:
    model = materialised(family, attention).eval()
    ids, positions = packed_rows()
    changed = ids.clone()
    changed[:, :7] = (ids[:, :7] + 1 + torch.arange(7)) % 97
    with torch.no_grad():
        first, second = (model(input_ids=x, position_ids=positions).logits for x in (ids, changed))
        alone = model(input_ids=ids[:, 7:], position_ids=positions[:, 7:]).logits
    assert (first[:, :7] - second[:, :7]).abs().max() > 1e-2
    torch.testing.assert_close(first[:, 7:], second[:, 7:], rtol=0, atol=1e-6)
    torch.testing.assert_close(first[:, 7:], alone, rtol=0, atol=1e-6)


def test_auto_attention_follows_device_and_family() -> None:
    config = ModelConfig(config=tiny_config("llama"))
    implementation = {
        (device, packed): build_on_meta(config, device_type=device, packed=packed).config._attn_implementation
        for device in ("cpu", "cuda")
        for packed in (True, False)
    }
    assert build_on_meta(config, device_type="cpu", compiled=True).config._attn_implementation == "sdpa"
    assert implementation == {
        ("cpu", True): "per_document",
        ("cpu", False): "sdpa",
        ("cuda", True): "flex_attention",
        ("cuda", False): "sdpa",
    }
    olmoe = ModelConfig(config=tiny_config("olmoe"))
    assert build_on_meta(olmoe, device_type="cuda").config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="flex_attention"):
        build_on_meta(ModelConfig(config=tiny_config("olmoe"), attention="flex_attention"))


def test_special_tokens_of_another_tokenizer_are_not_taken_over() -> None:
    model = materialised("olmoe")
    assert model.config.pad_token_id is None
    assert model.get_input_embeddings().padding_idx is None


def test_vocabulary_is_filled_and_checked() -> None:
    config = {k: v for k, v in tiny_config("llama").items() if k != "vocab_size"}
    assert build_on_meta(ModelConfig(config=config), vocab_size=300).config.vocab_size == 300
    assert build_on_meta(ModelConfig(config=tiny_config("llama")), vocab_size=50).config.vocab_size == 97
    with pytest.raises(ConfigError, match="at least 98"):
        build_on_meta(ModelConfig(config=tiny_config("llama")), vocab_size=98)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"config": tiny_config("llama") | {"model_type": "lama"}}, "llama"),
        ({"config": tiny_config("llama", hidden_sizes=3)}, "did you mean hidden_size"),
        ({"config": tiny_config("llama", hidden_size="many")}, "give a whole number"),
        ({"config": tiny_config("llama", num_attention_heads=5)}, "not a multiple"),
        ({"config": {"model_type": "vit"}}, "cannot be built"),
        ({"path": "/nowhere/at/all"}, "no folder"),
        ({"path": "org/sub/name"}, "no folder"),
    ],
)
def test_bad_sections_are_one_line(section: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build_on_meta(ModelConfig(**section))
    assert "\n" not in str(caught.value)


def test_rows_longer_than_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings=64"):
        build_on_meta(ModelConfig(config=tiny_config("llama")), sequence_length=65)
    with pytest.raises(ConfigError, match=r"model\.max_context=32"):
        build_on_meta(ModelConfig(config=tiny_config("llama"), max_context=32), sequence_length=33)


def test_a_dead_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="hub cannot be reached") as caught:
        build_on_meta(ModelConfig(path="nobody/nothing-of-this-name"))
    assert "\n" not in str(caught.value)


def test_pickled_code_and_quantised_checkpoints_are_refused(tmp_path) -> None:
    config = materialised("llama").config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no weights"):
        build_on_meta(ModelConfig(path=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, which is a pickle"):
        build_on_meta(ModelConfig(path=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    remote = {k: v for k, v in config.items() if k != "model_type"} | {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(remote))
    with pytest.raises(ConfigError, match="trust_remote_code=true"):
        build_on_meta(ModelConfig(path=str(tmp_path)))
    quantised = config | {"quantization_config": {"quant_method": "bitnet"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match="quantised"):
        build_on_meta(ModelConfig(path=str(tmp_path)))


def test_load_frozen_returns_the_saved_model(tmp_path) -> None:
    model = materialised("qwen3", "per_document").eval()
    model.save_pretrained(tmp_path)
    frozen = load_frozen(str(tmp_path))
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    ids, positions = packed_rows()
    with torch.no_grad():
        torch.testing.assert_close(
            frozen(input_ids=ids, position_ids=positions).logits,
            model(input_ids=ids, position_ids=positions).logits,
            rtol=0,
            atol=0,
        )
    half = load_frozen(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_parameters_are_counted_once_and_by_activity() -> None:
    model = build_on_meta(ModelConfig(config=tiny_config("llama")))
    table = 97 * 32
    untied = build_on_meta(ModelConfig(config=tiny_config("llama", tie_word_embeddings=False)))
    assert num_parameters(untied)[0] == num_parameters(model)[0] + table
    model.get_input_embeddings().requires_grad_(False)
    assert num_parameters(model)[1] == num_parameters(model)[0] - table
    assert num_active_parameters(model) == num_parameters(model)[0]
    moe = build_on_meta(ModelConfig(config=tiny_config("qwen3_moe")))
    one_expert = 3 * 24 * 32
    assert num_active_parameters(moe) == num_parameters(moe)[0] - 2 * one_expert
