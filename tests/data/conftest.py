"""A tiny tokenizer, trained once a session."""

import pytest

from leanmill.data.config import TokenizerConfig
from leanmill.data.tokenizer import trained_tokenizer
from tests.data.samples import sentences


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tokenizer(cache_root):
    return trained_tokenizer(
        TokenizerConfig(vocab_size=320), text_key="sentences", texts=lambda: iter(sentences(50)), root=cache_root
    )
