"""Families whose blocks are Llama's."""

import pytest
import torch
from transformers import AutoConfig

import leanmill.models.folded_llama.register  # noqa: F401  (transformers then knows it)
from leanmill.core.errors import ConfigError
from leanmill.core.llama_like import LLAMA_LIKE, OWN_FAMILIES, check_family, completed, own_config


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_a_family_of_our_own_says_what_the_model_was(family):
    before = AutoConfig.for_model(**(SIZES | {"model_type": family}))
    check_family("cut", before, LLAMA_LIKE, "layers")
    after = own_config("cut", "folded_llama", before, num_layers_by_block=[1] * before.num_hidden_layers, head_dim=8)
    assert after.model_type in OWN_FAMILIES
    assert (after.qk_norm, after.attention_bias) == (family == "qwen3", family == "qwen2")
    for name in ("hidden_size", "vocab_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert getattr(after, name) == getattr(before, name), name
    bias = {"self_attn.o_proj.bias"} if family == "qwen2" else set()
    found = dict(completed(after, 4, [("self_attn.o_proj.weight", torch.ones(4, 2, dtype=torch.bfloat16))]))
    assert found.keys() - {"self_attn.o_proj.weight"} == bias
    assert all(found[name].dtype == torch.bfloat16 and not found[name].any() for name in bias)


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"cut makes layers of llama, .* and 'gpt2' is none of them; give a model"):
        check_family("cut", AutoConfig.for_model("gpt2"), LLAMA_LIKE, "layers")
    window = AutoConfig.for_model(**SIZES | {"model_type": "mistral", "sliding_window": 8})
    with pytest.raises(ConfigError, match="windows of 8 tokens, which layers cannot have"):
        check_family("cut", window, LLAMA_LIKE, "layers")
    llama = AutoConfig.for_model(**SIZES | {"model_type": "llama"})
    with pytest.raises(ConfigError, match="cut: no folded_llama is like this: "):
        own_config("cut", "folded_llama", llama, num_layers_by_block=[99])
