"""Layers that share: the family's equations, gradients, folder, cache and count of operations."""

from __future__ import annotations

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.flops import flops_per_token
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen
from tests.models.families import tiny_config as tiny_config


SIZES = {
    "model_type": "folded_llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_layers_by_block": [1, 3],
    "tie_word_embeddings": False,
}
BLOCK_OF_LAYER = [(0, 0), (1, 0), (1, 1), (1, 2)]
"""(block, which of its layers)."""


def built(config: dict[str, object]) -> torch.nn.Module:
    model_config = ModelConfig(config=config)
    model = build_on_meta(model_config)
    make_materialiser(model_config, seed=3)(model)
    model.requires_grad_(True)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():  # norms must not be alike
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def written_out(folded, family, **changes):
    """The plain model whose layers hold copies."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("model_type", "num_layers_by_block")}
    plain = built(tiny_config(family, **sizes | changes))
    state = dict(folded.state_dict())
    for layer, (block, use) in enumerate(BLOCK_OF_LAYER):
        for name, tensor in folded.model.layers[block].state_dict().items():
            parts = name.split(".")
            if "layernorm" not in name:
                state[f"model.layers.{layer}.{name}"] = tensor
            elif parts[1] == str(use):
                state[f"model.layers.{layer}.{parts[0]}.weight"] = tensor
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


@pytest.mark.parametrize(("family", "qk_norm"), [("llama", False), ("qwen3", True)])
def test_it_is_the_model_of_copies_and_sums_their_gradients(family, qk_norm):
    folded = built(SIZES | {"qk_norm": qk_norm})
    plain = written_out(folded, family)
    ids = torch.arange(14).view(2, 7)
    losses = [model(input_ids=ids, labels=ids).loss for model in (folded, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    mine, theirs = folded.model.layers[1], plain.model.layers
    weights = ["self_attn.k_proj.weight", "mlp.down_proj.weight"] + ["self_attn.q_norm.weight"] * qk_norm
    for name in weights:
        copies = sum(theirs[layer].get_parameter(name).grad for layer in (1, 2, 3))
        torch.testing.assert_close(mine.get_parameter(name).grad, copies)
    for use in range(3):
        torch.testing.assert_close(mine.input_layernorm[use].weight.grad, theirs[1 + use].input_layernorm.weight.grad)
    assert flops_per_token(folded, 7) == flops_per_token(plain, 7)


def test_a_saved_folder_loads_and_generates_with_a_cache(tmp_path):
    model = built(SIZES)
    model.save_pretrained(tmp_path)
    again = load_frozen(str(tmp_path))
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        new = again.generate(ids[:, :4], max_new_tokens=5, do_sample=False, use_cache=True)
        assert torch.equal(new[:, 4:], model(input_ids=new, use_cache=False).logits.argmax(-1)[:, 3:-1])
    assert len(again.model.layers) == 2


@pytest.mark.parametrize("layers", [[1, 2], [4, 0], [2, 3]])
def test_numbers_that_do_not_add_up_are_one_line(layers):
    with pytest.raises(ConfigError, match="add up to num_hidden_layers=4"):
        build_on_meta(ModelConfig(config=SIZES | {"num_layers_by_block": layers}))
