"""Layers of their own sizes: the family's equations, its folder and its cache."""

from __future__ import annotations

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.flops import attention_flops_per_token
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen
from tests.models.families import tiny_config as tiny_config


SIZES = {
    "model_type": "pruned_llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_attention_heads_by_layer": [4, 1],
    "num_key_value_heads_by_layer": [2, 1],
    "intermediate_size_by_layer": [7, 48],
    "qk_norm": True,
    "residual_rotations": True,
}
NO_ATTENTION_FIRST = {
    "num_hidden_layers": 3,
    "num_attention_heads_by_layer": [0, 4, 1],
    "num_key_value_heads_by_layer": [0, 2, 1],
    "intermediate_size_by_layer": [48, 0, 7],
    "rank_by_linear": {"self_attn.o_proj": [0, 3, 0], "mlp.gate_proj": [5, 0, 0]},
}


def built(**changes: object) -> torch.nn.Module:
    config = ModelConfig(config=SIZES | changes)
    model = build_on_meta(config)
    make_materialiser(config, seed=3)(model)
    return model.eval()


def test_of_even_sizes_it_is_llama_and_qwen3() -> None:
    even: dict[str, object] = {f"{name}_by_layer": None for name in ("num_attention_heads", "num_key_value_heads")}
    even |= {"intermediate_size_by_layer": None, "residual_rotations": False}
    ids = torch.arange(14).view(2, 7)
    for family, qk_norm in (("llama", False), ("qwen3", True)):
        ours = built(**even, qk_norm=qk_norm, head_dim=8)
        config = ModelConfig(config=tiny_config(family, head_dim=8, tie_word_embeddings=False))
        theirs = build_on_meta(config)
        make_materialiser(config, seed=3)(theirs)
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_a_layer_adds_its_halves_to_a_turned_stream() -> None:
    layer = built().model.layers[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    position = (torch.ones(2, 5, 8), torch.zeros(2, 5, 8))
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(x), position_embeddings=position, attention_mask=None
    )
    between = x @ layer.attention_rotation.weight.t() + attended
    after = between @ layer.mlp_rotation.weight.t() + layer.mlp(layer.post_attention_layernorm(between))
    torch.testing.assert_close(layer(x, position_embeddings=position), after)


def test_a_saved_folder_loads_and_generates_with_a_cache(tmp_path) -> None:
    model = built(**NO_ATTENTION_FIRST)
    model.save_pretrained(tmp_path)
    again = load_frozen(str(tmp_path))
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        new = again.generate(ids[:, :4], max_new_tokens=5, do_sample=False, use_cache=True)
        assert torch.equal(new[:, 4:], model(input_ids=new, use_cache=False).logits.argmax(-1)[:, 3:-1])
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (4, 2)
    assert attention_flops_per_token(again.config, 7) == 6 * 5 * 16 * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size_by_layer": [48]}, "of at least 0 for 2 layers"),
        ({"rank_by_linear": {"mlp.up_proj": [1]}}, "a rank of at least 0 for 2 layers"),
        ({"rank_by_linear": {"mlp.norm": [1, 1]}}, "layer 0 has no linear layer mlp.norm"),
        ({"num_key_value_heads_by_layer": [3, 1]}, "3 key-value heads do not divide"),
        ({"num_attention_heads_by_layer": [0, 0], "num_key_value_heads_by_layer": [0, 0]}, "no layer with attention"),
        (
            {
                "num_attention_heads_by_layer": [0, 2],
                "num_key_value_heads_by_layer": [0, 2],
                "intermediate_size_by_layer": [0, 48],
            },
            "neither attention nor neurons",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_on_meta(ModelConfig(config=SIZES | changes))
