from __future__ import annotations

import pytest
import torch

from leanmill.architecture.layernorm_scaling.around import scale_norm
from leanmill.architecture.layernorm_scaling.config import LayerNormScaling
from leanmill.core.around import arounds
from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.export.folding import fold
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from leanmill.trainer.prepare import install_techniques
from tests.core.tiny import context, install, loss_of, tiny, tokens


SCALING = {"type": "layernorm_scaling"}


def _family(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def _reference(model, ids):
    """Llama with every pre-norm's output divided by sqrt(l), l from 1, written out."""
    body, eps = model.model, model.config.rms_norm_eps

    def norm(module, x, layer):
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return module.weight * scaled / layer**0.5

    hidden = body.embed_tokens(ids)
    angles = body.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None].to(hidden.dtype)
    for layer, block in enumerate(body.layers, start=1):
        normed = norm(block.input_layernorm, hidden, layer)
        hidden = hidden + block.self_attn(hidden_states=normed, position_embeddings=angles, attention_mask=causal)[0]
        hidden = hidden + block.mlp(norm(block.post_attention_layernorm, hidden, layer))
    return model.lm_head(norm(body.norm, hidden, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_values_and_gradients_are_the_papers(dtype, tolerance, mode):
    ids = tokens(3, 11)
    model, reference = _family("llama").to(dtype).train(), _family("llama").to(dtype)
    install(model, SCALING)
    apply_activation_checkpointing(model, mode)
    got, expected = _logits(model, ids), _reference(reference, ids)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 10)
    weights = torch.randn(got.shape, dtype=dtype)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - grads[name].grad).norm()
        assert difference <= tolerance * grads[name].grad.norm(), name


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "phi", "cohere", "mixtral"]
)
def test_a_folded_model_is_plain_and_computes_the_same(family):
    model, plain, ids = _family(family).eval(), _family(family).eval(), tokens()
    names = list(model.state_dict())
    install(model, SCALING)
    scaled = [place.name for place in Sites(model).modules("norm") if list(arounds(place.module))]
    assert len(scaled) == 3 * (1 if family in ("phi", "cohere") else 2)
    with torch.no_grad():
        expected, base = _logits(model, ids), _logits(plain, ids)
        fold(model)
        got = _logits(model, ids)
    assert list(model.state_dict()) == names
    assert (expected - base).abs().max() > 1e-4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_only_norms_before_attention_and_mlp_are_scaled():
    model = _family("gemma3_text")
    install(model, SCALING)
    found = [
        place.name.partition("layers.1.")[2] for place in Sites(model).modules("norm") if list(arounds(place.module))
    ]
    assert [name for name in found if name] == ["input_layernorm", "pre_feedforward_layernorm"]
    assert float(next(arounds(model.model.layers[2].input_layernorm)).factor) == pytest.approx(3**-0.5)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_exported_from_such_a_run_goes_on_as_what_it_is(family, tmp_path):
    plain, ids = _family(family).eval(), tokens()
    plain.save_pretrained(tmp_path)
    for start in ("as_loaded", "as_scaled"):
        config = ModelConfig(path=str(tmp_path))
        model = build_on_meta(config)
        install_techniques([LayerNormScaling(start=start)], model, context())
        make_materialiser(config, seed=0)(model)
        difference = (_logits(model.eval(), ids) - _logits(plain, ids)).abs().max()
        assert difference < 2e-6 if start == "as_loaded" else difference > 1e-4


def test_compiles_with_its_block_once_for_all_layers():
    from torch._dynamo.utils import counters

    model, expected, ids = tiny(num_hidden_layers=3), tiny(num_hidden_layers=3), tokens()
    for other in (model, expected):
        install(other, SCALING)
    torch._dynamo.reset()
    counters.clear()
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_of(model, ids), loss_of(expected, ids))
    assert counters["stats"]["unique_graphs"] == 1


def test_families_that_no_export_can_express_are_refused():
    with pytest.raises(ConfigError, match="normalises after them or folds .* with pre-norms"):
        install(_family("olmo2"), SCALING)
    with pytest.raises(ConfigError, match="has no weight, in which an export puts"):
        install(_family("olmo"), SCALING)
    with pytest.raises(ConfigError, match="no norm that layernorm_scaling knows"):
        scale_norm(_Other(), 0.5, "other")


class _Other(torch.nn.Module):
    """Something with a weight that is no norm."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x * self.weight.square()
