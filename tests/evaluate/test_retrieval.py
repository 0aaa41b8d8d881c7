import math
import re

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig
from leanmill.evaluate import retrieval
from leanmill.recipe.evaluate import Retrieval
from tests.evaluate.parrots import Parrot, asked


@pytest.fixture(autouse=True)
def filler(monkeypatch):
    tokens = torch.tensor([ord(letter) for letter in "words and more words. "]).repeat(40)
    monkeypatch.setattr(retrieval, "_filler", lambda data, asked, length: tokens)


def remembers(texts):
    """Continues the question with the key that the text holds; keeps the texts it saw."""

    def next_of(prefix):
        text = "".join(map(chr, prefix))
        texts.append(text)
        key = re.search(r"Remember it: (\d+) is", text).group(1)
        return ord((" " + key + ".")[len(text.rpartition("The pass key is")[2])])

    return Parrot(next_of)


def test_a_model_that_remembers_finds_every_key_at_every_depth():
    texts = []
    config = Retrieval(lengths=[256, 300], num_texts=5)
    scores = retrieval.ask(config, DataConfig(), 0, asked(remembers(texts)))
    assert [(s.group, s.metric, s.count) for s in scores] == [
        ("256 tokens", "accuracy", 5),
        ("256 tokens", "bits/digit", 5),
        ("300 tokens", "accuracy", 5),
        ("300 tokens", "bits/digit", 5),
    ]
    assert [s.value for s in scores[::2]] == [1, 1]
    assert max(s.value for s in scores[1::2]) < 1e-6
    whole = [text for text in texts if len(text) == 255]  # all but the answer's last token, which predicts nothing
    places = [text.index("The pass key") for text in whole]
    assert len(whole) == 5
    assert places == sorted(places)
    assert places[0] == 1
    assert whole[-1][places[-1] :].count("words") == 0
    assert len({re.search(r"\d+", text).group() for text in whole}) == 5


def test_a_model_that_knows_nothing_pays_for_every_digit():
    accuracy, bits = retrieval.ask(
        Retrieval(lengths=[256], num_texts=3), DataConfig(), 0, asked(Parrot(lambda p: 1, scale=0))
    )
    assert accuracy.value == 0
    assert bits.value == pytest.approx(math.log2(256) * 6 / 5)  # the blank before the key is a token too


def test_texts_follow_the_seed():
    def seen(seed):
        texts = []
        retrieval.ask(Retrieval(lengths=[256], num_texts=2), DataConfig(), seed, asked(remembers(texts)))
        return texts

    assert seen(1) == seen(1) != seen(2)


def test_lengths_that_do_not_fit():
    with pytest.raises(ConfigError, match="more than the model's 128"):
        retrieval.ask(Retrieval(lengths=[256]), DataConfig(), 0, asked(Parrot(lambda p: 1, longest=128)))
    with pytest.raises(ConfigError, match="too few for a key"):
        retrieval.ask(Retrieval(lengths=[64]), DataConfig(), 0, asked(Parrot(lambda p: 1)))
    assert retrieval.lengths_of(Retrieval(), DataConfig(sequence_length=512)) == [128, 256, 512]
