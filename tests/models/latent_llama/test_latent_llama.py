"""Partly rotary keys and a latent: the family's equations, its folder and its cache."""

from __future__ import annotations

import math

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen


SIZES = {
    "model_type": "latent_llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "kv_lora_rank": 7,
    "rope_head_dim": 4,
    "rotary_frequencies": [[[0, 3], [1, 2]], [[0, 1], [0, 2]]],
}


def built(**changes: object) -> torch.nn.Module:
    config = ModelConfig(config=SIZES | changes)
    model = build_on_meta(config)
    make_materialiser(config, seed=3)(model)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention tells
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    return model.eval()


def by_hand(attention, x, frequencies):
    """Softmax attention a head at a time: pairs turn by their own frequency, the rest does not."""
    length = x.shape[1]
    theta = 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    latent = x @ attention.kv_down_proj.weight.t()
    out = []
    for head in range(4):
        group = head // 2
        q = (x @ attention.q_proj.weight.t())[..., head * 8 : head * 8 + 8]
        k_rope = (x @ attention.k_rope_proj.weight.t())[..., group * 4 : group * 4 + 4]
        k = (latent @ attention.k_up_proj.weight.t())[..., group * 4 : group * 4 + 4]
        v = (latent @ attention.v_up_proj.weight.t())[..., group * 8 : group * 8 + 8]
        angles = torch.arange(length)[:, None] * theta[frequencies[group]]
        z_q, z_k = (torch.complex(z[..., :2], z[..., 2:]) * torch.exp(1j * angles) for z in (q[..., :4], k_rope))
        scores = torch.einsum("bqc,bkc->bqk", z_q, z_k.conj()).real + q[..., 4:] @ k.transpose(1, 2)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        out.append((scores / math.sqrt(8)).masked_fill(~causal, -math.inf).softmax(-1) @ v)
    return torch.cat(out, dim=-1) @ attention.o_proj.weight.t()


def test_attention_and_its_gradients_are_the_papers() -> None:
    model = built().double()
    attention = model.model.layers[1].self_attn
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tables = model.model.rotary_emb(x.float(), position_ids=torch.arange(6)[None])
    found, _ = attention(hidden_states=x, position_embeddings=tuple(t.double() for t in tables), attention_mask=None)
    wanted = by_hand(attention, x, SIZES["rotary_frequencies"][1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # tables are fp32
    parameters = dict(attention.named_parameters())
    ours, theirs = (torch.autograd.grad(one.square().sum(), parameters.values()) for one in (found, wanted))
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=name)


def test_a_saved_folder_loads_and_generates_with_a_cache_of_latents(tmp_path) -> None:
    model = built()
    model.save_pretrained(tmp_path)
    again = load_frozen(str(tmp_path))
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        new = again.generate(ids[:, :4], max_new_tokens=5, do_sample=False, use_cache=True)
        assert torch.equal(new[:, 4:], model(input_ids=new, use_cache=False).logits.argmax(-1)[:, 3:-1])
        cache = again(input_ids=ids, use_cache=True).past_key_values
    assert sum(tensor[0, :, 0].numel() for tensor in (cache.layers[0].keys, cache.layers[0].values)) == 7 + 2 * 4


@pytest.mark.parametrize(
    "changes", [{"rope_head_dim": 5}, {"rope_head_dim": 8}, {"rotary_frequencies": [[[0, 0], [1, 2]]] * 2}]
)
def test_sizes_that_do_not_fit_are_one_line(changes) -> None:
    with pytest.raises(ConfigError, match="rope_head_dim=|2 of 4 for each of 2 key-value heads"):
        build_on_meta(ModelConfig(config=SIZES | changes))
