"""Every setting of `model.config` is checked; what transformers takes is taken."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.mapping import check_forward, mapped_config
from tests.models.families import FAMILIES, tiny_config


def build(family, **changes):
    return build_on_meta(ModelConfig(config=tiny_config(family, **changes)), sequence_length=16)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hiden_size": 3}, "model.config.hiden_size is no setting of 'llama'; did you mean hidden_size"),
        ({"Hidden_Size": 3}, "did you mean hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is no size; give at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is no size"),
        ({"num_hidden_layers": 10**6}, "give at most 1000"),
        ({"intermediate_size": -352}, "intermediate_size=-352 is no size"),
        ({"hidden_size": 10**12}, "is beyond any model"),
        ({"hidden_size": 2**24, "intermediate_size": 2**30}, "parameters"),
        ({"hidden_size": "64"}, "model.config.hidden_size='64' is not allowed; give a whole number"),
        ({"hidden_size": None}, "hidden_size=None is not allowed; give a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not allowed; give true or false"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads (5); correct"),
        ({"num_key_value_heads": 3}, "does not divide num_attention_heads=4; give one of 1, 2, 4"),
        ({"head_dim": 7}, "even rotary dimension"),
        ({"vocab_size": 0}, "vocab_size=0 is no size"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1 is no size"),
        ({"hidden_act": "sillu"}, "hidden_act='sillu' is not known to transformers; correct it, e.g. silu"),
        (
            {"rope_parameters": {"rope_type": "yarm"}},
            "rope_type='yarm' is not known to transformers; correct it, e.g. yarn",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "Missing required keys"),
        ({"rope_theta": "x"}, "rope_theta='x' is not allowed; give a number"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 is not allowed; give a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not allowed; give a finite number"),
        ({"attention_dropout": 7}, "attention_dropout=7 is not allowed; give a share"),
        ({"pad_token_id": 999}, "pad_token_id=999 is no token of vocab_size=97"),
        ({"eos_token_id": [1, 99]}, "eos_token_id=99 is no token"),
        ({"rope_theta": None}, "rope_theta=None is not allowed; give a number"),
        ({"dtype": "foo"}, "dtype='foo' is no dtype; remove it"),
        ({"dtype": [[1]]}, "is no dtype; remove it"),
        ({"torch_dtype": 3}, "torch_dtype=3 is no dtype; remove it"),
        ({"return_dict": 0}, "return_dict=0 changes what a model returns"),
        ({"return_dict": False}, "return_dict=False changes what a model returns"),
    ],
)
def test_what_makes_no_llama_is_refused_in_one_line(changes, expected):
    with pytest.raises(ConfigError) as error:
        build("llama", **changes)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok=9 is more than num_local_experts=3; give at most 3",
        ),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok=0 is no size"),
        # Nothing declares these; running a few tokens finds them.
        ("mixtral", {"hidden_size": 36}, "does not make a model"),
        ("qwen3_moe", {"head_dim": 9}, "even rotary dimension"),
        ("deepseek_v3", {"n_group": 3}, "n_group=3 does not divide n_routed_experts=4; give one of 1, 2, 4"),
        ("deepseek_v3", {"topk_group": 3}, "topk_group=3 is more than n_group=2; give at most 2"),
        (
            "deepseek_v3",
            {"num_experts_per_tok": 3},
            "leaves a token 2 experts, and num_experts_per_tok=3; give topk_group at least 2",
        ),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(family, changes, expected):
    with pytest.raises(ConfigError) as error:
        build(family, **changes)
    assert expected in str(error.value)


@pytest.mark.parametrize("model_type", ["lama", "vit", "", None, 3, "Llama"])
def test_a_type_that_is_no_causal_lm_names_near_ones(model_type):
    with pytest.raises(ConfigError, match="did you mean"):
        mapped_config({"model_type": model_type}, None)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "hidden_size": 64}),  # names of its attribute_map too
        ("llama", {"torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "transformers_version": "5.0"}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "use_cache": True, "id2label": {"0": "a"}}),
        ("llama", {"rope_theta": 500000, "partial_rotary_factor": 0.5, "head_dim": 16, "_name_or_path": "x"}),
        ("qwen3", {"layer_types": ["full_attention"] * 32, "sliding_window": None}),
    ],
)
def test_keys_that_transformers_takes_by_other_ways_are_taken(model_type, settings):
    config = mapped_config({"model_type": model_type, **settings}, None)
    for key in ("n_embd", "hidden_size", "rope_theta"):
        if key in settings:
            found = getattr(config, key, None) or config.rope_parameters[key]
            assert found == settings[key]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_configuration_reads_back(family):
    first = mapped_config(tiny_config(family), None)
    again = mapped_config(first.to_dict(), None)
    assert again.to_dict() == first.to_dict()


def test_what_cannot_run_on_meta_with_its_own_sizes_is_not_blamed(monkeypatch):
    calls = []

    def fail(config, task):
        calls.append(type(config))
        raise RuntimeError("no kernel for meta")

    monkeypatch.setattr("leanmill.models.mapping._forward_on_meta", fail)
    check_forward(mapped_config(tiny_config("llama"), None), tiny_config("llama"))
    assert len(calls) == 2


def test_trying_a_model_leaves_no_trace():
    before = torch.get_rng_state()
    config = mapped_config(tiny_config("mixtral"), None)
    values = config.to_dict()
    check_forward(config, tiny_config("mixtral"))
    assert config.to_dict() == values
    assert torch.equal(torch.get_rng_state(), before)


def test_nested_sections_are_checked_too():
    assert "text_config" in CONFIG_MAPPING["gemma3"]().to_dict()
    with pytest.raises(ConfigError, match=r"model\.config\.text_config\.hiden_size .* did you mean hidden_size"):
        mapped_config({"model_type": "gemma3", "text_config": {"hiden_size": 3}}, None)
