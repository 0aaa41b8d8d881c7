"""Attention document by document is attention over whole rows with a mask: values, gradients, and when it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.documents import Documents
from leanmill.core.errors import ConfigError, RunError
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.document_attention import NAME, document_attention, document_mask, register
from tests.models.families import FAMILIES, tiny_config


LENGTHS = [(5, 1, 2), (8,), (3, 5)]
"""Documents of rows of 8."""
SIZE = 4
CPU = torch.device("cpu")
register()


def by_hand(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Values [B, S, H, D], place by place."""
    rows, copies = [], query.shape[1] // key.shape[1]
    for row, lengths in enumerate(LENGTHS):
        begin = [sum(lengths[:n]) for n, length in enumerate(lengths) for _ in range(length)]
        for head in range(query.shape[1]):
            k, v = key[row, head // copies], value[row, head // copies]
            for place in range(8):
                first = begin[place] if window is None else max(begin[place], place - window + 1)
                weights = (query[row, head, place] @ k[first : place + 1].T * 0.3).softmax(-1)
                rows.append(weights @ v[first : place + 1])
    return torch.stack(rows).view(len(LENGTHS), query.shape[1], 8, SIZE).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_values_and_gradients_are_those_of_each_place_by_hand(groups: int, window: int | None) -> None:
    torch.manual_seed(groups)
    given = [
        torch.randn(len(LENGTHS), n, 8, SIZE, dtype=torch.float64, requires_grad=True) for n in (4, groups, groups)
    ]
    outer = torch.randn(len(LENGTHS), 8, 4, SIZE, dtype=torch.float64)
    documents = Documents(tuple(length for row in LENGTHS for length in row), len(LENGTHS), window, CPU)
    found, _ = document_attention(nn.Identity(), *given, documents, scaling=0.3)
    wanted = by_hand(*given, window)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad((x * outer).sum(), given) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    repeated = [tensor.repeat_interleave(4 // tensor.shape[1], 1) for tensor in given]
    dense = F.scaled_dot_product_attention(*repeated, attn_mask=documents.dense(), scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)


def made(attention: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    family = AutoConfig.for_model(**(tiny_config("llama") | config))
    return AutoModelForCausalLM.from_config(family, attn_implementation=attention)  # type: ignore[no-any-return]


def step(model: Any, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(positions.numel()).view_as(positions) * 7 % 97
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten().roll(-1)).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


POSITIONS = torch.tensor([[*range(9), *range(5), *range(2)], [*range(16)], [0, *range(15)]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "olmoe"])
def test_families_train_as_with_a_mask(family: str, dtype: torch.dtype) -> None:
    config = ModelConfig(config=tiny_config(family))
    chosen = build_on_meta(config, device_type="cpu").config._attn_implementation
    assert chosen == NAME
    found = {}
    for attention in (NAME, "sdpa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**tiny_config(family)), attn_implementation=attention, dtype=dtype
        )
        found[attention] = step(model, POSITIONS)
    # Of each tensor's own size: gradients of norms are a thousandth of the table's.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    (logits, gradients), (wanted, others) = found.values()
    assert gradients.keys() == others.keys()
    for name, gradient in [*gradients.items(), ("logits", logits)]:
        expected = wanted if name == "logits" else others[name]
        assert (gradient - expected).float().norm() <= tolerance * expected.float().norm(), name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing(mode: Any) -> None:
    plain, recomputed = (made(NAME).train() for _ in range(2))
    apply_activation_checkpointing(recomputed, mode)
    (logits, gradients), (others, same) = step(plain, POSITIONS), step(recomputed, POSITIONS)
    assert torch.equal(logits, others)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


class Masks:
    """Notes what a model's attention is given."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Any] = []
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.append(kwargs["attention_mask"])


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "mistral", "sliding_window": 4}, 4),
    ],
)
def test_a_packed_row_is_its_documents(family: dict[str, Any], window: int | None) -> None:
    model = made(NAME, **family)
    masks = Masks(model)
    step(model, POSITIONS)
    for mask in masks.seen:
        assert isinstance(mask, Documents)
        assert (mask.lengths, mask.window) == ((9, 5, 2, 16, 1, 15), window)
    logits, wanted = (step(made(name, **family), POSITIONS)[0] for name in (NAME, "sdpa"))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
        {"model_type": "llama4_text", "head_dim": 8, "attention_chunk_size": 6, "num_local_experts": 2},
        {"model_type": "gpt_neox"},
        {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32},
    ],
    ids=lambda family: str(family["model_type"]),
)
def test_layers_of_several_kinds_and_other_families_agree_with_sdpa(family: dict[str, Any]) -> None:
    (logits, gradients), (wanted, others) = (step(made(name, **family), POSITIONS) for name in (NAME, "sdpa"))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=5e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=5e-6, msg=name)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_family_without_sdpa_is_eager(family: str) -> None:
    config = tiny_config("llama") | {"model_type": family, "head_dim": 8}
    assert build_on_meta(ModelConfig(config=config), device_type="cpu").config._attn_implementation == "eager"


def test_what_is_no_packed_row_is_left_to_sdpa() -> None:
    model: Any = made(NAME)
    other: Any = made("sdpa")
    masks = Masks(model)
    step(model, POSITIONS[1:2])
    assert masks.seen == [None, None]
    padded = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    assert torch.equal(model(**padded).logits, other(**padded).logits)
    model.eval(), other.eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**padded, **settings), other.generate(**padded, **settings))


def test_masks_that_documents_do_not_say_are_made() -> None:
    given = {"batch_size": 1, "q_length": 6, "kv_length": 6, "device": CPU, "allow_is_causal_skip": False}
    places = torch.arange(6)
    both_ways = document_mask(mask_function=lambda b, h, q, k: q // 3 == k // 3, **given)
    assert isinstance(both_ways, Tensor)
    assert torch.equal(both_ways[0, 0], places[:, None] // 3 == places // 3)
    chunked = document_mask(mask_function=lambda b, h, q, k: (q // 4 == k // 4) & (k <= q), local_size=4, **given)
    assert isinstance(chunked, Documents)
    assert chunked.lengths == (4, 2)
    assert torch.equal(chunked.dense()[0, 0], (places[:, None] // 4 == places // 4) & (places <= places[:, None]))
    gap = document_mask(mask_function=lambda b, h, q, k: (k <= q) & (k != 0) | (q == 0) & (k == 0), **given)
    assert isinstance(gap, Documents)  # the first token is a document of its own
    assert gap.lengths == (1, 5)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_a_family_adds_to_attention_is_refused(name: str) -> None:
    heads = torch.zeros(1, 1, 2, SIZE)
    with pytest.raises(RunError, match=f"{name}.*set model.attention=eager"):
        document_attention(nn.Identity(), heads, heads, heads, Documents((1, 1), 1, None, CPU), **{name: 1.0})


def test_families_without_it_are_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="set model.attention=sdpa"):
        build_on_meta(ModelConfig(config=tiny_config("olmoe"), attention=NAME))
