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


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_adds_to_what_it_shares(bias):
    """h = W' x + B A x in every projection: against the plain model whose layers hold W' + B A."""
    relaxed = built(SIZES | {"qk_norm": True, "adapter_rank": 3, "attention_bias": bias, "mlp_bias": bias})
    plain = built(SIZES | {"qk_norm": True, "num_layers_by_block": [1] * 4, "attention_bias": bias, "mlp_bias": bias})
    mine = relaxed.model.layers
    with torch.no_grad():
        for layer, (block, use) in enumerate(BLOCK_OF_LAYER):
            for name, parameter in plain.model.layers[layer].named_parameters():
                part, projection, *rest = name.split(".")
                own = mine[block].own[use] if block == 1 else {}
                if "layernorm" in part:
                    parameter.copy_(getattr(mine[block], part)[use].weight)
                elif projection in own and projection.endswith("_norm"):
                    parameter.copy_(own[projection].weight)
                else:
                    parameter.copy_(mine[block].get_parameter(name))
                    if projection in own and rest == ["weight"]:
                        parameter += own[projection].up @ own[projection].down
                    elif projection in own:
                        parameter += own[projection].bias
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            plain.get_submodule(name).load_state_dict(relaxed.get_submodule(name).state_dict())
    ids = torch.arange(14).view(2, 7)
    losses = [model(input_ids=ids, labels=ids).loss for model in (relaxed, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for projection, part in (("k_proj", "self_attn"), ("down_proj", "mlp")):
        grads = [plain.model.layers[layer].get_parameter(f"{part}.{projection}.weight").grad for layer in (1, 2, 3)]
        shared = mine[1].get_parameter(f"{part}.{projection}.weight").grad
        torch.testing.assert_close(shared, sum(grads), rtol=1e-4, atol=1e-6)
        own = mine[1].own[2][projection]
        torch.testing.assert_close(own.up.grad, grads[2] @ own.down.mT, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.down.grad, own.up.mT @ grads[2], rtol=1e-4, atol=1e-6)
    if not bias:  # each adapter multiplies once a token
        extra = sum(one.numel() for name, one in mine[1].own.named_parameters() if "norm" not in name)
        assert flops_per_token(relaxed, 7) == flops_per_token(plain, 7) + 6 * extra


def test_drawn_adapters_add_nothing():
    config = ModelConfig(config=SIZES | {"adapter_rank": 3})
    model = build_on_meta(config)
    make_materialiser(config, seed=3)(model)
    own = model.model.layers[1].own[0]["q_proj"]
    assert not own.up.any()
    assert own.down.any()


def test_a_saved_folder_loads_and_generates_with_a_cache(tmp_path):
    model = built(SIZES | {"adapter_rank": 3, "qk_norm": True})
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
