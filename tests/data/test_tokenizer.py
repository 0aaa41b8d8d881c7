"""Trained and loaded tokenizers."""

import json

import pytest

from leanmill.core.errors import ConfigError, RunError
from leanmill.data.config import TokenizerConfig
from leanmill.data.tokenizer import load_tokenizer, other_tokens, tokenizer_fingerprint, trained_tokenizer
from tests.data.samples import sentences


def train(root, *, key="k", texts=None, **config):
    texts = sentences(50) if texts is None else texts
    return trained_tokenizer(
        TokenizerConfig(**{"vocab_size": 320, **config}), text_key=key, texts=lambda: iter(texts), root=root
    )


def test_any_text_survives_encoding_and_decoding(tokenizer):
    for text in ["", " two  spaces ", "naïve 漢字 \U0001f600", "\x00\x7f\r\n\t", "<|user|>hi<|endoftext|>"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_training_is_deterministic(tmp_path):
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    assert first.get_vocab() == second.get_vocab()


def test_trained_once_then_read_from_the_cache(tmp_path):
    first = train(tmp_path)
    again = trained_tokenizer(TokenizerConfig(vocab_size=320), text_key="k", texts=lambda: 1 / 0, root=tmp_path)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)


def test_other_text_or_size_is_another_tokenizer(tmp_path):
    prints = {
        tokenizer_fingerprint(t)
        for t in (
            train(tmp_path),
            train(tmp_path, vocab_size=300),
            train(tmp_path, key="other", texts=["entirely different words here"] * 9),
            train(tmp_path, num_training_bytes=60),
        )
    }
    assert len(prints) == 4


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 320
    assert tokenizer.eos_token == "<|endoftext|>"
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]


def test_fingerprint_ignores_what_calls_leave_behind(tmp_path):
    tokenizer = train(tmp_path)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) != before


def test_tokens_are_compared_by_their_numbers(tmp_path):
    mine, other = train(tmp_path / "a"), train(tmp_path / "b", texts=["entirely different words here"] * 9)
    mine.save_pretrained(tmp_path / "mine")
    other.save_pretrained(tmp_path / "other")
    assert len(mine) >= len(other)
    said = other_tokens(mine, str(tmp_path / "other"))
    number = next(n for n in range(320) if mine.convert_ids_to_tokens(n) != other.convert_ids_to_tokens(n))
    assert said.startswith(f"number {number} is {mine.convert_ids_to_tokens(number)!r} in its tokenizer and ")
    assert other_tokens(mine, str(tmp_path / "mine")) == ""
    assert other_tokens(mine, str(tmp_path)) is None
    mine.add_tokens(["<beyond>"])
    assert "'<beyond>' in its tokenizer and no token in that" in other_tokens(mine, str(tmp_path / "mine"))
    mine.save_pretrained(tmp_path / "more")
    assert other_tokens(train(tmp_path / "a"), str(tmp_path / "more")) == ""


def test_a_saved_tokenizer_loads_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "t"))) == tokenizer_fingerprint(tokenizer)


def test_a_missing_folder_is_refused():
    with pytest.raises(ConfigError, match="no folder './nowhere'"):
        load_tokenizer("./nowhere")


def test_a_hub_that_does_not_answer_is_one_line_with_the_remedy():
    with pytest.raises(RunError, match=r"data\.tokenizer\.path: 'nobody/nothing'.*local folder") as caught:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    with pytest.raises(ConfigError, match="no eos token"):
        load_tokenizer(str(tmp_path))


def test_own_code_is_run_only_where_the_recipe_says_so(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own_code.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    code = (
        "from transformers import PreTrainedTokenizerFast\n\nclass Own(PreTrainedTokenizerFast):\n    was_run = True\n"
    )
    (tmp_path / "own_code.py").write_text(code)
    with pytest.raises(
        ConfigError, match=r"Python code of its own.*set data\.tokenizer\.trust_remote_code=true"
    ) as caught:
        load_tokenizer(str(tmp_path))
    assert "Parquet" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_tokenizer(str(tmp_path), trust_remote_code=True).was_run
