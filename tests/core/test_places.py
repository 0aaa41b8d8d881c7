from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leanmill.core.around import Around, Ring
from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from tests.core.tiny import FAMILIES, MIXTURES, install, tiny


_OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {"head_dim": 16, "num_experts": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    "apertus": {},
}


def _on_meta(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**sizes, **{**FAMILIES, **_OTHERS}[family], **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class _Weighed(Around):
    """Something with a matrix of its own."""

    technique, ring = "weighed", Ring.SCALE

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def _names(model, kind):
    """Names below the layer, of layer 0 (or the only one)."""
    places = Sites(model).modules(kind)
    layer = min((place.layer for place in places if place.layer is not None), default=None)
    return [place.name.split(f".{layer}.")[-1] for place in places if place.layer == layer and layer is not None]


@pytest.mark.parametrize("family", [*FAMILIES, *_OTHERS])
def test_every_family_has_blocks_norms_and_attention(family):
    model = _on_meta(family)
    blocks = Sites(model).modules("block")
    assert [place.layer for place in blocks] == [0, 1]
    assert all(model.get_submodule(place.name) is place.module for place in blocks)
    # Every second layer of the one family with mixers of another kind, which are no attention.
    if family != "qwen3_next":
        assert len(_names(model, "attention")) == 1
    last = [place for place in Sites(model).modules("norm") if place.layer is None]
    assert len(last) == 1
    assert last[0].name.rpartition(".")[2] in ("norm", "ln_f", "final_layer_norm")


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm"]),
        ("qwen3", ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"]),
        ("gpt2", ["ln_1", "ln_2"]),
        ("olmo", ["input_layernorm", "post_attention_layernorm"]),
        ("apertus", ["self_attn.q_norm", "self_attn.k_norm", "attention_layernorm", "feedforward_layernorm"]),
    ],
)
def test_norms_are_norms_only(family, norms):
    assert _names(_on_meta(family), "norm") == norms


@pytest.mark.parametrize(
    ("family", "mlp"),
    [("llama", ["mlp"]), ("gpt2", ["mlp"]), ("mixtral", ["mlp"]), ("opt", ["fc1", "fc2"]), ("qwen3_next", ["mlp"])],
)
def test_mlp_is_what_sees_one_token_at_a_time(family, mlp):
    assert _names(_on_meta(family), "mlp") == mlp


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_in_the_layers_that_have_experts(family):
    places = Sites(_on_meta(family)).modules("router")
    assert [place.layer for place in places] == ([1] if family.startswith("deepseek") else [0, 1])
    assert {place.name.rpartition(".")[2] for place in places} == {"gate"}


def test_a_model_without_is_refused_with_what_to_type():
    with pytest.raises(ConfigError, match="no router .* model.config.model_type, e.g. mixtral"):
        Sites(_on_meta("llama")).modules("router")
    with pytest.raises(ConfigError, match="no block"):
        Sites(nn.Linear(2, 2)).modules("block")


def test_stages_and_adapters_change_no_place():
    model = tiny("qwen3_moe")
    kinds = ("block", "attention", "router", "norm", "mlp")
    before = {kind: [(p.name, p.layer) for p in Sites(model).modules(kind)] for kind in kinds}
    lora = {"type": "lora", "rank": 2, "alpha": 2, "where": "branch", "targets": ["q_proj"]}
    install(model, {"type": "ternary"}, lora)
    for kind in kinds:
        for place in Sites(model).modules(kind):
            place.around(_Weighed())
    assert {kind: [(p.name, p.layer) for p in Sites(model).modules(kind)] for kind in kinds} == before
