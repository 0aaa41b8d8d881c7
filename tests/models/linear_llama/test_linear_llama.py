"""Linear attention: the paper's equation pair by pair, values and gradients; documents, caches and folders."""

from __future__ import annotations

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.linear_llama.hybrid_attention import hybrid_attention
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen


SIZES = {
    "model_type": "linear_llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "sliding_window": 5,
    "feature_dim": 6,
    "qk_norm": True,
}


def built(**changes: object) -> torch.nn.Module:
    config = ModelConfig(config=SIZES | changes)
    model = build_on_meta(config)
    make_materialiser(config, seed=3)(model)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention tells
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    return model.eval()


def by_hand(q, k, v, fq, fk, factor, documents, window):
    """The equation, a query at a time."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n in range(q.shape[2]):
                mine = [m for m in range(n + 1) if documents[b, m] == documents[b, n]]
                near, behind = [m for m in mine if n - m < window], [m for m in mine if n - m >= window]
                s = k[b, h, near] @ q[b, h, n] * 0.3
                weights = [factor[h] * (s - s.max()).exp(), fk[b, h, behind] @ fq[b, h, n]]
                weights = torch.cat(weights)
                rows.append(weights @ v[b, h, near + behind] / weights.sum())
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


@pytest.mark.parametrize(
    ("length", "window", "chunk", "dtype"), [(23, 3, 4, torch.float32), (9, 4, 64, torch.bfloat16)]
)
def test_it_is_the_papers_equation(length, window, chunk, dtype) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, length, 5, generator=g) for _ in range(2))
    v = torch.randn(2, 2, length, 3, generator=g)
    fq, fk = (torch.randn(2, 2, length, 4, generator=g).softmax(-1) for _ in range(2))
    factor = torch.tensor([0.1, 0.7])
    # The first row has three documents, one of which ends within a chunk and one of which is longer than two.
    documents = torch.zeros(2, length, dtype=torch.long)
    documents[0, 2:], documents[0, length - 3 :] = 1, 2
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v, fq, fk, factor)]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not reach it
        found = hybrid_attention(*inputs, documents, window=window, scaling=0.3, chunk=chunk)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = by_hand(*exact, documents, window)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    weight = torch.randn(want.shape, generator=g, dtype=torch.float64)
    (found.double() * weight).sum().backward()
    (want * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hole", [slice(7, 8), slice(4, 8), slice(5, 17), slice(0, 6), slice(38, 45)])
def test_holes_in_a_text_change_nothing_of_what_is_around_them(hole: slice) -> None:
    """Tokens that an attention mask takes out, wherever chunks end."""
    length, window = 45, 3
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, length, 5, generator=g) for _ in range(3))
    fq, fk = (torch.randn(2, 2, length, 4, generator=g).softmax(-1) for _ in range(2))
    documents = torch.zeros(2, length, dtype=torch.long)
    documents[0, 9:], documents[1, 40:] = 1, 3
    documents[:, hole] = -1
    factor = torch.tensor([0.1, 0.7])
    found = hybrid_attention(q, k, v, fq, fk, factor, documents, window=window, scaling=0.3, chunk=4)
    want = by_hand(*(tensor.double() for tensor in (q, k, v, fq, fk, factor)), documents, window)
    is_real = (documents >= 0)[:, None, :, None].expand_as(want)
    torch.testing.assert_close(found.double()[is_real], want[is_real], rtol=1e-5, atol=1e-6)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model, ids = built(), torch.arange(150).remainder(97)[None]
    positions = torch.cat([torch.arange(11), torch.arange(139)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :11], ids[:, 11:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_not_seen() -> None:
    model, ids = built(), torch.arange(12)[None]
    padded = torch.cat([torch.full((1, 7), 5), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 7), torch.ones(1, 12)], dim=1).long()
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert torch.equal(model.generate(padded, attention_mask=mask, **arguments)[:, 7:], plain)


def test_a_saved_folder_loads_and_generates_with_a_state_of_one_size(tmp_path) -> None:
    model = built()
    model.save_pretrained(tmp_path)
    again = load_frozen(str(tmp_path))
    ids = torch.arange(2 * 150).view(2, 150).remainder(97)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, parts = None, []
        for part in ids.split([3, 100, 1, 46], dim=1):
            out = again(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    (layer, _) = cache.layers
    assert layer.keys.shape == (2, 2, 4, 10)
    assert layer.recurrent_states[0].shape == (2, 4, 12, 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 1}, "sliding_window=1 is to be at least 2"),
        ({"attention_dropout": 0.1}, "no maps to drop out of"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_on_meta(ModelConfig(config=SIZES | changes))
