"""Tokens, targets and bytes of documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.core.errors import ConfigError
from leanmill.data.conversations import check_messages
from leanmill.data.encoding import Encoder, batches
from tests.data.samples import conversations


def test_a_document_is_its_tokens_and_the_end_of_text(tokenizer):
    encoded = Encoder(tokenizer, "pretrain").encode(["mill stone"])[0]
    assert encoded.ids.tolist() == [*tokenizer("mill stone", add_special_tokens=False)["input_ids"], 0]
    assert encoded.is_target is None


def test_text_that_mentions_a_special_token_does_not_end_a_document(tokenizer):
    ids = Encoder(tokenizer, "pretrain").encode(["a<|endoftext|>b"])[0].ids
    assert (ids == 0).sum() == 1
    assert ids[-1] == 0
    assert tokenizer.decode(ids[:-1]) == "a<|endoftext|>b"


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    Encoder(tokenizer, "pretrain").encode(["x"])
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


@settings(deadline=None, max_examples=80)
@given(st.text(max_size=60))
def test_bytes_of_the_tokens_sum_to_the_text(tokenizer, text):
    measured = Encoder(tokenizer, "pretrain").measure(text)
    assert bytes(measured.text) == text.encode()
    assert measured.num_bytes.sum() == len(text.encode())
    assert len(measured.num_bytes) == len(measured.encoded.ids)
    assert (measured.num_bytes >= 0).all()
    assert measured.num_bytes[-1] == 0
    assert measured.encoded.ids.tolist() == Encoder(tokenizer, "pretrain").encode([text])[0].ids.tolist()


def test_bytes_of_each_token_where_tokens_end_with_characters(tokenizer):
    measured = Encoder(tokenizer, "pretrain").measure("mill naïve £5")
    for index, (token, size) in enumerate(zip(measured.encoded.ids[:-1], measured.num_bytes, strict=False)):
        piece = bytes(measured.text[measured.num_bytes[:index].sum() :][:size])
        if "\ufffd" not in tokenizer.decode([token]):
            assert piece.decode() == tokenizer.decode([token])


def test_bytes_of_answers_leave_the_markers_out(tokenizer):
    measured = Encoder(tokenizer, "sft").measure(conversations(1)[0])
    target_bytes = measured.num_bytes[measured.encoded.is_target].sum()
    assert target_bytes == len("answer 0 0")
    assert measured.num_bytes.sum() == len(measured.text)
    assert b"<|" not in bytes(measured.text)


def test_a_tokenizer_that_opens_with_bos_does_so_here(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer.save_pretrained(tmp_path)
    own = type(tokenizer).from_pretrained(str(tmp_path), bos_token="<|system|>")
    opening = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 3)])
    own.backend_tokenizer.post_processor = opening
    measured = Encoder(own, "pretrain").measure("mill")
    assert measured.encoded.ids[0] == 3
    assert measured.encoded.ids[-1] == 0
    assert measured.num_bytes.tolist()[0] == 0
    assert measured.num_bytes.sum() == 4
    assert np.array_equal(Encoder(own, "pretrain").encode(["mill"])[0].ids, measured.encoded.ids)


@pytest.mark.parametrize(
    "value", ["text", [{"role": "user"}], [{"content": "x"}], ["x"], {"role": "user"}, [{"role": 3, "content": "x"}]]
)
def test_what_is_not_a_conversation_is_refused(value):
    with pytest.raises(ConfigError, match="must be a list of"):
        check_messages(value, lambda: "column")


def test_batches_keep_order_and_bound_size():
    documents = ["x" * 400_000] * 7
    found = list(batches(documents))
    assert [d for batch in found for d in batch] == documents
    assert max(len(batch) for batch in found) == 3
