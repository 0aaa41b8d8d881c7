"""Held-out rows and the bytes they stand for."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data, build_train_data
from leanmill.data.evaluation import order0_bits_per_byte
from tests.data.samples import conversations, hf_config, sentences, write_jsonl, write_texts


def entropy(data: bytes) -> float:
    return -sum(n / len(data) * math.log2(n / len(data)) for n in Counter(data).values())


def target_bytes(tokenizer, labels) -> bytes:
    """The bytes behind the labels, token by token, from the vocabulary itself."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    assert set(byte_of) == set(ByteLevel.alphabet())
    tokens = (tokenizer.convert_ids_to_tokens(t) for t in labels.flatten().tolist() if t != -100)
    return b"".join(bytes(byte_of[c] for c in token) for token in tokens if not token.startswith("<|"))


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("rule", ["split", "truncate"])
@pytest.mark.parametrize("num_tokens", [1, 32 * 5, 10**6])
def test_bytes_are_those_of_the_labels(tokenizer, tmp_path, document_mask, rule, num_tokens):
    config = hf_config(
        write_texts(tmp_path / "a.jsonl", 40),
        tmp_path,
        source={"validation_fraction": 0.6},
        document_mask=document_mask,
        long_documents=rule,
    )
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=num_tokens)
    # A character that straddles two tokens, of which one is a label, belongs to the one that starts it.
    expected = target_bytes(tokenizer, domain.rows["labels"])
    assert abs(domain.num_bytes - len(expected)) <= 2 * len(domain.rows["labels"])
    assert domain.order0_bits_per_byte == pytest.approx(entropy(expected), abs=0.03)
    num_rows, size = domain.rows["labels"].shape
    assert size == 32
    labels = domain.rows["labels"]
    assert not (labels != -100)[~domain.rows.get("token_mask", torch.ones_like(labels, dtype=torch.bool))].any()
    assert num_rows == max(1, num_tokens // 32) or num_tokens == 10**6


def test_ascii_bytes_are_exact(tokenizer, tmp_path):
    rows = [{"text": f"plain words number {n} " * (n % 9 + 1)} for n in range(60)]
    config = hf_config(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, source={"validation_fraction": 0.5})
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=320)
    expected = target_bytes(tokenizer, domain.rows["labels"])
    assert domain.num_bytes == len(expected)
    assert domain.order0_bits_per_byte == pytest.approx(entropy(expected), rel=1e-12)


def test_held_out_text_is_not_trained(tokenizer, tmp_path):
    config = hf_config(write_texts(tmp_path / "a.jsonl", 60), tmp_path, source={"validation_fraction": 0.3})
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=10**6)
    train = tokenizer.decode(build_train_data(config, tokenizer, seed=0).next_rows(400)["input_ids"].flatten())
    held_out = [t for t in sentences(60) if t.split(":")[0] + ":" not in train]
    assert 5 < len(held_out) < 35
    evaluated = tokenizer.decode(domain.rows["input_ids"].flatten())
    assert all(text in evaluated for text in held_out)
    assert evaluated.count("text ") == len(held_out)


def test_fewer_tokens_than_a_row_are_padded(tokenizer, tmp_path):
    config = hf_config(
        write_texts(tmp_path / "a.jsonl", 9), tmp_path, source={"validation_fraction": 0.9}, sequence_length=2048
    )
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=10**6)
    assert domain.rows["labels"].shape == (1, 2048)
    expected = target_bytes(tokenizer, domain.rows["labels"])
    assert abs(domain.num_bytes - len(expected)) <= 2
    assert tokenizer.decode(domain.rows["input_ids"][0]).count("text 5") == 1
    # The last token predicts nothing, and is one all the same.
    mask, has_label = domain.rows["token_mask"][0], domain.rows["labels"][0] != -100
    assert mask.sum() == has_label.nonzero().max() + 2
    assert mask[: mask.sum()].all()


def test_sft_counts_the_bytes_of_answers(tokenizer, tmp_path):
    config = hf_config(
        write_jsonl(tmp_path / "a.jsonl", [{"messages": c} for c in conversations(20)]),
        tmp_path,
        source={"validation_fraction": 0.5},
        task="sft",
        sequence_length=128,
    )
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=10**6)
    expected = target_bytes(tokenizer, domain.rows["labels"])
    assert domain.num_bytes == len(expected)
    assert expected.startswith(b"answer")
    assert domain.order0_bits_per_byte == pytest.approx(entropy(expected), rel=1e-12)


def test_same_rows_from_the_cache(tokenizer, tmp_path):
    config = hf_config(write_texts(tmp_path / "a.jsonl", 60), tmp_path, source={"validation_fraction": 0.5})
    first, again = (build_eval_data(config, tokenizer, tokens_per_domain=320)[0] for _ in range(2))
    assert all(bool((first.rows[name] == again.rows[name]).all()) for name in first.rows)
    assert (first.num_bytes, first.order0_bits_per_byte) == (again.num_bytes, again.order0_bits_per_byte)


def test_nothing_held_out(tokenizer, tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 2)
    assert build_eval_data(hf_config(path, tmp_path), tokenizer, tokens_per_domain=64) == []
    config = hf_config(path, tmp_path, source={"validation_fraction": 1e-9})
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=64)  # one of two
    write_texts(tmp_path / "a.jsonl", 1)
    with pytest.raises(ConfigError, match=r"no text of 'data' is held out.*validation_fraction: 0"):
        build_eval_data(config, tokenizer, tokens_per_domain=64)
    (said,) = domain.shortfall()
    assert said.startswith("'data' has ")
    assert "held-out tokens and is evaluated on those, 64 were asked for (eval.tokens_per_domain)" in said
    (enough,) = build_eval_data(
        hf_config(write_texts(tmp_path / "b.jsonl", 60), tmp_path, source={"validation_fraction": 0.5}),
        tokenizer,
        tokens_per_domain=64,
    )
    assert enough.shortfall() == []


NO_ANSWERS = [[{"role": "user", "content": f"why {n}?"}] for n in range(30)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fraction", [1e-9, 0.4])
@pytest.mark.parametrize(
    ("task", "rows", "blamed"),
    [
        ("pretrain", [{"text": " "}] * 3, r"3 without text; the first is row 1 of .*column 'text'"),
        ("sft", [{"messages": []}] * 3, r"3 without messages; the first is row 1 of .*column 'messages'"),
        ("sft", [{"messages": c} for c in NO_ANSWERS], r"without an assistant turn; the first is row \d+ of "),
        ("pretrain", [], "holds no rows"),
    ],
    ids=["text", "messages", "answer", "rows"],
)
def test_data_that_cannot_be_used_is_not_blamed_on_what_is_held_out(
    tokenizer, tmp_path, streaming, fraction, task, rows, blamed
):
    source = {"validation_fraction": fraction, "streaming": streaming}
    config = hf_config(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, source=source, task=task)
    with pytest.raises(ConfigError, match=blamed) as caught:
        build_eval_data(config, tokenizer, tokens_per_domain=64)
    assert "validation_fraction" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_held_out_conversations_without_answers_are_passed_over(tokenizer, tmp_path):
    good, bad = ([{"messages": c} for c in chats] for chats in (conversations(9), NO_ANSWERS))
    write_jsonl(tmp_path / "train.jsonl", good)
    source = {"validation_split": "test"}
    config = hf_config(str(tmp_path), tmp_path, source=source, task="sft", sequence_length=128)
    write_jsonl(tmp_path / "test.jsonl", bad)
    with pytest.raises(ConfigError, match=r"'data \(held out\)' can be used .*30 without an assistant turn"):
        build_eval_data(config, tokenizer, tokens_per_domain=128)
    write_jsonl(tmp_path / "test.jsonl", [*bad, *good])
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=10**6)
    assert "why 3?" not in tokenizer.decode(domain.rows["input_ids"].flatten())


def test_order0_of_known_counts():
    assert order0_bits_per_byte(np.bincount([1, 2, 3, 4], minlength=256)) == 2.0
    assert order0_bits_per_byte(np.bincount([7, 7, 7], minlength=256)) == 0.0
    assert order0_bits_per_byte(np.ones(256, dtype=np.int64)) == pytest.approx(8.0)
