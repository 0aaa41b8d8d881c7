"""A key in a long text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data
from leanmill.data.config import DataConfig
from leanmill.evaluate.asking import Asked
from leanmill.evaluate.scores import Score
from leanmill.recipe.evaluate import Retrieval


_NEEDLE = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"


def lengths_of(config: Retrieval, data: DataConfig) -> list[int]:
    """Return the lengths of texts in tokens."""
    return config.lengths or sorted({max(64, data.sequence_length // part) for part in (4, 2, 1)})


def ask(config: Retrieval, data: DataConfig, seed: int, asked: Asked) -> list[Score]:
    """Ask for each key at the end of its text.

    A key counts as found where every token of it is the likeliest given the ones before. Beside that stand the bits a
    digit that the key costs: a guess among ten costs 3.32, and a model too small to find a whole key still shows there
    what it lost.

    Raises:
        ConfigError: A length does not fit the model, or there is no held-out text.
    """
    found: list[Score] = []
    for length in lengths_of(config, data):
        longest = asked.opened.longest
        if longest is not None and length > longest:
            raise ConfigError(
                f"retrieval.lengths: {length} tokens are more than the model's {longest}; give lengths up to that, or "
                f"lower data.sequence_length, whose parts are the default"
            )
        filler = _filler(data, asked, length)
        texts = [_text(config, asked, filler, length, number, seed) for number in range(config.num_texts)]
        found += _scores(f"{length} tokens", config.num_digits, texts, asked)
    return found


def _filler(data: DataConfig, asked: Asked, length: int) -> Tensor:
    """At least `length` tokens of held-out text, int64."""
    domains = build_eval_data(data, asked.opened.tokenizer, tokens_per_domain=2 * length)
    if not domains:
        raise ConfigError(
            "retrieval hides keys in held-out text, and data.source holds none out; set validation_fraction"
        )
    rows = domains[0].rows
    mask = rows.get("token_mask")
    tokens = rows["input_ids"].flatten() if mask is None else rows["input_ids"][mask]
    return tokens.repeat(-(-length // len(tokens)) + 1)


def _text(
    config: Retrieval, asked: Asked, filler: Tensor, length: int, number: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Tokens of one text with its question, and those of its key; `length` together."""
    # A seed of text is hashed the same in every process.
    draw = random.Random(f"{seed} {length} {number}")
    key = str(draw.randrange(10 ** (config.num_digits - 1), 10**config.num_digits))
    encode = lambda text: asked.opened.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    needle, question = encode(_NEEDLE.format(key=key)), encode(_QUESTION)
    both = encode(f"{_QUESTION} {key}")
    if both[: len(question)] != question:
        question = encode(f"{_QUESTION} ")  # a tokenizer whose blanks are tokens of their own
        both = encode(f"{_QUESTION} {key}")
    answer = both[len(question) :]
    room = length - len(needle) - len(both)
    if room < 0 or not answer:
        raise ConfigError(f"retrieval.lengths: {length} tokens are too few for a key and its question; give more")
    start = draw.randrange(len(filler) - room + 1)
    depth = number / max(1, config.num_texts - 1)
    before = round(room * depth)
    text = filler[start : start + room].tolist()
    return torch.tensor([*text[:before], *needle, *text[before:], *question]), torch.tensor(answer)


def _scores(group: str, num_digits: int, texts: Sequence[tuple[Tensor, Tensor]], asked: Asked) -> list[Score]:
    right, nats = [False] * len(texts), [0.0] * len(texts)
    for size in sorted({len(answer) for _, answer in texts}):
        here = [index for index, (_, answer) in enumerate(texts) if len(answer) == size]
        # The last token of the answer predicts nothing that is asked.
        rows = [torch.cat([texts[index][0], texts[index][1][:-1]]) for index in here]
        for index, logits in zip(here, asked.last_logits(rows, size), strict=True):
            answer = texts[index][1]
            right[index] = bool((logits.argmax(-1) == answer).all())
            nats[index] = float(F.cross_entropy(logits, answer, reduction="sum"))
    count = len(texts)
    bits = sum(nats) / math.log(2) / (count * num_digits)
    accuracy = sum(right) / count
    common = {"task": "retrieval", "group": group, "count": count}
    return [
        Score(**common, metric="accuracy", value=accuracy, items=tuple(right)),  # type: ignore[arg-type]
        Score(**common, metric="bits/digit", value=bits, lower_is_better=True),  # type: ignore[arg-type]
    ]
