"""Pairs of answers: formats of rows, what is refused, and how they lie in rows of tokens."""

import pytest

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data, build_train_data
from leanmill.data.pairs import Pair, pair_of
from tests.data.samples import hf_config, write_jsonl


USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "why"), ("assistant", "so"), ("assistant", "no"))
)
EXPECTED = Pair([USER], [GOOD], [BAD])


def where():
    return "row 7 of pairs.jsonl"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why", "chosen": "so", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "why", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3},
    ],
)
def test_formats_of_rows(row):
    assert pair_of(row, where) == EXPECTED


def test_a_system_prompt_and_tools_go_to_the_first_turn():
    tool = {"type": "function", "function": {"name": "look"}}
    pair = pair_of({"system": "be brief", "prompt": "why", "chosen": "so", "rejected": "no", "tools": [tool]}, where)
    assert pair.prompt == [{"role": "system", "content": "be brief", "tools": [tool]}, USER]


def test_rows_without_a_prompt_or_an_answer_are_none():
    assert pair_of({"prompt": "why", "chosen": "", "rejected": "no"}, where) is None
    assert pair_of({"prompt": None, "chosen": "so", "rejected": "no"}, where) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "why", "chosen": "so", "rejected": "so"}, "row 7 of pairs.jsonl has the same answer as chosen"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "row 7 of pairs.jsonl has the same answer"),
        ({"prompt": "why", "completion": "so"}, "needs the columns chosen and rejected.*row 7.*has completion, prompt"),
        ({"prompt": "why", "chosen": [USER], "rejected": "no"}, "'chosen' in row 7 .*ends with a turn of 'user'"),
        ({"prompt": "why", "chosen": 3, "rejected": "no"}, "column 'chosen' in row 7"),
    ],
)
def test_what_is_no_pair_is_refused_by_its_row(row, message):
    with pytest.raises(ConfigError, match=message):
        pair_of(row, where)


def pairs(count):
    return [
        {"prompt": f"ask {n} " + "why " * (n % 5), "chosen": f"yes {n}", "rejected": "no " * (1 + n % 3)}
        for n in range(count)
    ]


def config(tmp_path, rows, **data):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    source = data.pop("source", {})
    return hf_config(path, tmp_path, task="preference", source=source, **{"sequence_length": 128, **data})


@pytest.mark.parametrize("mismatched", [False, True])
def test_a_pair_lies_in_one_row_and_answers_alone_are_predicted(tmp_path, tokenizer, mismatched):
    data = build_train_data(config(tmp_path, pairs(20), mismatched_answers=mismatched), tokenizer, seed=0)
    assert "20 pairs" in data.describe()
    rows, num_pieces, seen = data.next_rows(data.rows_per_epoch), 3 if mismatched else 2, []
    for ids, labels, positions, mask in zip(
        *(rows[k] for k in ("input_ids", "labels", "position_ids", "token_mask")), strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        spans = [(a, b) for a, b in zip(starts, starts[1:], strict=False) if mask[a]]
        assert len(spans) % num_pieces == 0
        texts = [tokenizer.decode(ids[a:b]) for a, b in spans]
        answers = [
            tokenizer.decode([i for i in labels[a:b].tolist() if i != -100], skip_special_tokens=True) for a, b in spans
        ]
        for first in range(0, len(spans), num_pieces):
            prompt, number = texts[first].split("yes")[0], int(answers[first].split()[1])
            assert answers[first + 1].strip() == ("no " * (1 + number % 3)).strip()
            assert all(text.startswith(prompt) for text in texts[first : first + num_pieces])
            if mismatched:
                assert answers[first + 2].split()[0] == "yes"
                assert answers[first + 2] != answers[first]
            seen.append(number)
    assert sorted(seen) == list(range(20))


def _mismatched(data, tokenizer, num_rows):
    """Number of the pair whose answer each pair got, by its own number."""
    rows, found = data.next_rows(num_rows), {}
    for labels, positions in zip(rows["labels"], rows["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(labels)]
        spans = [labels[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        answers = [tokenizer.decode(ids[ids != -100], skip_special_tokens=True) for ids in spans if (ids != -100).any()]
        numbers = [int(text.split()[1]) if text.startswith("yes") else -1 for text in answers]
        found |= dict(zip(numbers[::3], numbers[2::3], strict=True))
    return found


def test_a_pair_that_is_left_alone_gets_the_answer_of_the_one_before_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("leanmill.data.encoding._BATCH_CHARS", 40)
    given = config(tmp_path, pairs(6), mismatched_answers=True)
    found = _mismatched(build_train_data(given, tokenizer, seed=0), tokenizer, 6)
    assert found == {0: 1, 1: 2, 2: 0, 3: 4, 4: 3, 5: 4}


def test_earlier_answers_of_a_prompt_are_not_predicted(tmp_path, tokenizer):
    talk = [USER, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "and"}]
    rows = [{"prompt": talk, "chosen": [GOOD], "rejected": [BAD]}] * 2
    data = build_train_data(config(tmp_path, rows), tokenizer, seed=0)
    labels = [i for i in data.next_rows(1)["labels"].flatten().tolist() if i != -100]
    assert "earlier" not in tokenizer.decode(labels)


def test_a_pair_longer_than_a_row_is_refused_by_its_row(tmp_path, tokenizer):
    rows = pairs(5)
    rows[3]["prompt"] = "why " * 60
    with pytest.raises(ConfigError, match=r"row 4 of .*pairs\.jsonl has \d+ tokens, .*raise data\.sequence_length"):
        build_train_data(config(tmp_path, rows), tokenizer, seed=0)


def test_chosen_answers_are_evaluated(tmp_path, tokenizer):
    (domain,) = build_eval_data(
        config(tmp_path, pairs(40), source={"validation_fraction": 0.3}), tokenizer, tokens_per_domain=256
    )
    labels = [i for i in domain.rows["labels"].flatten().tolist() if i != -100]
    assert "yes" in tokenizer.decode(labels)
    assert "no" not in tokenizer.decode(labels)
    assert domain.num_bytes > 0


def test_a_single_pair_has_no_other_one_whose_answer_it_could_get(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="a single pair that can be used"):
        build_train_data(config(tmp_path, pairs(1), mismatched_answers=True), tokenizer, seed=0)
    assert "1 pair" in build_train_data(config(tmp_path, pairs(1)), tokenizer, seed=0).describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_documents": "truncate"}, "would cut an answer of a pair"),
        ({"document_mask": False}, "lets an answer of a pair see the other"),
        ({"task": "sft", "mismatched_answers": True}, "mismatched_answers: they are of pairs"),
    ],
)
def test_settings_that_do_not_fit_pairs_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, pairs(2)).model_validate({"task": "preference", **changes})
