"""Rows of sentence pairs: what lies where, in which order, and what is refused."""

import json

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data, build_tokenizer, build_train_data
from leanmill.data.config import DataConfig, HfDataset
from leanmill.data.sentences import sentence_pair_of


def rows(count=40):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    found = []
    for index in range(count):
        first = f"{words[index % 10]} {words[index // 10]} a"
        row = {"anchor": first, "positive": f"{first} b"}
        if index % 2:
            row["negatives"] = ["c", f"d {index}", "e"]
        if index % 5 == 0:
            row["score"] = index / 10
        found.append(row)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return folder


def config_of(folder, **changes):
    raw = {
        "task": "sentence_pairs",
        "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
        "tokenizer": {"vocab_size": 300},
        "num_negatives": 2,
        "sequence_length": 80,
        "cache_dir": str(folder / "cache"),
    }
    return DataConfig.model_validate({**raw, **changes})


def texts_of(batch, tokenizer):
    count, num_texts = batch["text_lengths"].shape
    ids = batch["input_ids"].view(count, num_texts, -1)
    return [
        [tokenizer.decode(text[1 : n - 1]) if n else None for text, n in zip(row, lengths.tolist(), strict=True)]
        for row, lengths in zip(ids, batch["text_lengths"], strict=True)
    ]


def test_a_row_holds_its_texts_side_by_side(folder):
    config = config_of(folder)
    tokenizer = build_tokenizer(config)
    data = build_train_data(config, tokenizer, seed=0)
    batch = data.next_rows(data.rows_per_epoch)
    known = {row["anchor"]: row for row in rows()}
    for texts, score, row in zip(texts_of(batch, tokenizer), batch["scores"][:, 0], range(1000), strict=False):
        expected = known.pop(texts[0])
        negatives = [*expected.get("negatives", [])[:2], None, None][:2]
        assert texts[1:] == [expected["positive"], *negatives]
        assert torch.equal(score, torch.tensor(expected.get("score", torch.nan))) or score.isnan()
        assert ("score" in expected) == (not score.isnan())
        assert (batch["labels"][row] != -100).sum() == 1
    ids = batch["input_ids"].view(-1, 4, 20)
    there = batch["text_lengths"] > 0
    assert (ids[..., 0][there] == tokenizer.cls_token_id).all()
    last = ids.gather(-1, (batch["text_lengths"] - 1).clamp(min=0)[..., None])[..., 0]
    assert (last[there] == tokenizer.sep_token_id).all()
    assert (batch["input_ids"][~batch["token_mask"]] == tokenizer.pad_token_id).all()
    assert torch.equal(batch["token_mask"].view(-1, 4, 20).sum(-1), batch["text_lengths"])


def test_rows_do_not_depend_on_ranks_and_go_on_after_a_resume(folder):
    config = config_of(folder)
    tokenizer = build_tokenizer(config)
    one, two = (build_train_data(config, tokenizer, seed=0) for _ in range(2))
    whole = one.next_rows(8)
    parts = [two.next_rows(8, rank=0, world_size=2)]
    two.load_state_dict(build_train_data(config, tokenizer, seed=0).state_dict())
    parts.append(two.next_rows(8, rank=1, world_size=2))
    for name in whole:
        assert torch.equal(
            torch.nan_to_num(whole[name].float()), torch.nan_to_num(torch.cat([p[name] for p in parts]).float())
        )
    resumed = build_train_data(config, tokenizer, seed=0)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert torch.equal(resumed.next_rows(30)["input_ids"], one.next_rows(30)["input_ids"])


def test_held_out_pairs_are_not_trained_on(folder):
    config = config_of(folder)
    tokenizer = build_tokenizer(config)
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=80 * 5)
    data = build_train_data(config, tokenizer, seed=0)
    trained = {texts[0] for texts in texts_of(data.next_rows(data.rows_per_epoch), tokenizer)}
    held_out = {texts[0] for texts in texts_of(domain.rows, tokenizer)}
    assert len(held_out) == 5
    assert not held_out & trained


def test_long_texts_are_refused_or_cut_as_asked(folder):
    config = config_of(folder, sequence_length=16)
    tokenizer = build_tokenizer(config)
    with pytest.raises(ConfigError, match=r"a text of row \d+ .* tokens, and each of the 4 texts .* has 4; raise it"):
        build_train_data(config, tokenizer, seed=0)
    cut = config_of(folder, sequence_length=16, long_documents="truncate")
    batch = build_train_data(cut, tokenizer, seed=0).next_rows(8)
    ids = batch["input_ids"].view(8, 4, 4)
    assert (batch["text_lengths"][:, 1] == 4).all()
    assert (ids[:, 1, -1] == tokenizer.sep_token_id).all()


HF = HfDataset(path="p.jsonl")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"sentence1": "a", "sentence2": "b", "score": 3}, (("a", "b"), 3.0)),
        ({"query": "a", "positive": "b", "negatives": "c"}, (("a", "b", "c"), None)),
        ({"question": "a", "answer": "b", "negatives": ["c", " "]}, (("a", "b", "c"), None)),
    ],
)
def test_columns_of_public_datasets_are_found(row, expected):
    found = sentence_pair_of(row, HF, lambda: "row 1")
    assert (found.texts, found.score) == expected


def test_a_row_without_a_text_is_left_out():
    assert sentence_pair_of({"anchor": "a", "positive": " "}, HF, lambda: "row 1") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "row 1 has no two columns such as anchor and positive, it has text; set first_field"),
        ({"anchor": "a", "positive": 3}, "column 'positive' holds int, not text, in row 1"),
        ({"anchor": "a", "positive": "b", "score": "high"}, "must hold a finite number, and holds 'high' in row 1"),
        ({"anchor": "a", "positive": "b", "negatives": [1]}, "must hold a text or a list of texts, in row 1"),
    ],
)
def test_bad_rows_are_refused_by_name(row, message):
    with pytest.raises(ConfigError, match=message):
        sentence_pair_of(row, HF, lambda: "row 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 82}, "in equal parts of 4 tokens or more; give a multiple of 4, e.g. 80"),
        ({"long_documents": "split"}, "would make two texts of one"),
        ({"task": "pretrain"}, "num_negatives: they are of sentence pairs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)
